// Ctrl+Enter runs, Esc stops, Alt+1…9 changes the tab.
document.addEventListener('keydown', e => {
  if (e.defaultPrevented) return;
  const panel = [...document.querySelectorAll('[role=tabpanel]')].filter(p => p.offsetParent && p.querySelector('[id$="-run"]')).at(-1);
  const press = end => { const b = panel && panel.querySelector(`button[id$="${end}"]`); if (b && !b.disabled) { b.click(); return true; } };
  if ((e.ctrlKey || e.metaKey) && e.key === 'Enter' && press('-run')) e.preventDefault();
  else if (e.key === 'Escape') press('-stop');
  else if (e.altKey && /^[1-9]$/.test(e.key)) { const t = document.querySelectorAll('#panels > .tab-wrapper [role=tab]')[+e.key - 1]; if (t) { t.click(); e.preventDefault(); } }
});
// Arrow keys let go of a range too, as the pointer does.
document.addEventListener('keyup', e => {
  if (e.target.matches && e.target.matches('input[type=range]') && e.key.startsWith('Arrow')) e.target.dispatchEvent(new PointerEvent('pointerup', {bubbles: true}));
});
