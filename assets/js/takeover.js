// Takes over what another panel left in window.locusHandoff. Gradio runs this body with `element`, `trigger`.
function take() {
  const told = window.locusHandoff;
  if (!told) return;
  window.locusHandoff = null;
  trigger('select', told);
}
window.addEventListener('locus-handoff', take);
take();
