// Ctrl+Enter runs, Esc stops, Alt+1…9 changes the tab.
document.addEventListener('keydown', e => {
  const panel = [...document.querySelectorAll('[role=tabpanel]')].find(p => p.offsetParent && p.querySelector('[id$="-run"]'));
  const press = end => { const b = panel && panel.querySelector(`button[id$="${end}"]`); if (b && !b.disabled) { b.click(); return true; } };
  if ((e.ctrlKey || e.metaKey) && e.key === 'Enter' && press('-run')) e.preventDefault();
  else if (e.key === 'Escape') press('-stop');
  else if (e.altKey && /^[1-9]$/.test(e.key)) { const t = document.querySelectorAll('#panels > .tab-wrapper [role=tab]')[+e.key - 1]; if (t) { t.click(); e.preventDefault(); } }
});
