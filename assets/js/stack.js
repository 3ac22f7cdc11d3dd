// Draws the stack of edits of panels/edit.py. Gradio runs this body with `element`, `props`, `trigger`, `watch`.
const root = element.querySelector('.stack');
function tell(act, row) { trigger('select', {act: act, row: row}); }
function draw() {
  const d = props.value || {}, focused = root.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  root.replaceChildren();
  if (!d.entries || !d.entries.length) {
    root.append(make('div', 'empty', d.hint || 'No edits yet.'));
    return;
  }
  d.entries.forEach((e, i) => {
    const row = make('div', 'edit-row' + (i === d.picked ? ' chosen' : '') + (e.on ? '' : ' off'));
    row.setAttribute('role', 'listitem');
    const on = make('input', 'on');
    on.type = 'checkbox'; on.checked = e.on; on.dataset.key = 'on' + i; on.setAttribute('aria-label', 'on or off: ' + e.title);
    on.addEventListener('change', () => tell('toggle', i));
    const name = make('button', 'name', e.title);
    name.type = 'button'; name.dataset.key = 'name' + i; name.title = 'Set this edit\'s strength below';
    name.setAttribute('aria-pressed', i === d.picked);
    name.addEventListener('click', () => tell('pick', i));
    row.append(on, name, make('span', 'strength', '× ' + Number(e.strength.toPrecision(3))));
    for (const [act, sign, what, dead] of [['up', '↑', 'Move up', i === 0], ['down', '↓', 'Move down', i === d.entries.length - 1], ['remove', '✕', 'Remove', false]]) {
      const b = make('button', 'act', sign);
      b.type = 'button'; b.disabled = dead; b.title = what; b.dataset.key = act + i; b.setAttribute('aria-label', what + ': ' + e.title);
      b.addEventListener('click', () => tell(act, i));
      row.append(b);
    }
    root.append(row);
  });
  if (focused) { const again = root.querySelector(`[data-key="${focused}"]`); if (again) again.focus(); }
}
watch('value', draw);
draw();
