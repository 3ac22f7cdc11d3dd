// Light or dark as a person chose, else as the system has it.
(() => {
  const read = () => { try { return localStorage.getItem('locus-theme'); } catch { return null; } };
  const apply = () => {
    const chosen = read(), body = document.body;
    if (chosen && body && body.classList.contains('dark') !== (chosen === 'dark')) body.classList.toggle('dark', chosen === 'dark');
  };
  window.locusTheme = () => {
    try { localStorage.setItem('locus-theme', document.body.classList.contains('dark') ? 'light' : 'dark'); } catch { document.body.classList.toggle('dark'); }
    apply();
  };
  const start = () => { apply(); new MutationObserver(apply).observe(document.body, {attributes: true, attributeFilter: ['class']}); };
  if (document.body) start(); else document.addEventListener('DOMContentLoaded', start);
})();
