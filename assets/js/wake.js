// Hears that something is to be done now that the page is there. Gradio runs this body with `element`, `props`,
// `trigger`, `watch`.
function hear() { if (props.value && props.value.asked) trigger('select', {}); }
watch('value', hear);
hear();
