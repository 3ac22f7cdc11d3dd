// Hears which run is to be opened in this panel. Gradio runs this body with `element`, `props`, `trigger`, `watch`.
const panel = props.value.panel;
function take() {
  const waiting = window.locusReopen || {}, told = waiting[panel];
  if (!told) return;
  delete waiting[panel];
  trigger('select', told);
}
window.addEventListener('locus-reopen', take);
take();
