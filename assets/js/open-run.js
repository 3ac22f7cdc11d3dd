text => {
  // Hands a run over to the panels that open it, whether their tab was opened before or not.
  if (!text) return;
  const told = JSON.parse(text);
  window.locusReopen = told.panels;
  window.dispatchEvent(new Event('locus-reopen'));
  if (!told.inner) return;
  let left = 40;  // the tab that holds the inner one may still be on its way
  const show = () => {
    const tab = [...document.querySelectorAll('#panels [role=tabpanel] [role=tab]')].find(t => t.offsetParent && t.textContent.trim() === told.inner);
    if (tab) tab.click(); else if (left--) setTimeout(show, 100);
  };
  show();
}
