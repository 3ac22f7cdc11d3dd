// Draws the list of runs of panels/runs_view.py. Gradio runs this body with `element`, `props`, `trigger`, `watch`.
const root = element.querySelector('.runs');
function tell(act, id) { trigger('select', {act: act, id: id}); }
function button(cls, text, what, key, on) {
  const b = make('button', cls, text);
  b.type = 'button'; b.title = what; b.dataset.key = key; b.setAttribute('aria-label', what);
  b.addEventListener('click', on);
  return b;
}
function line(r, chosen) {
  const row = make('div', 'run-row' + (chosen ? ' chosen' : '') + (r.fault ? ' damaged' : ''));
  row.setAttribute('role', 'listitem'); row.dataset.id = r.id;
  const tick = make('input', 'tick');
  tick.type = 'checkbox'; tick.checked = r.ticked; tick.dataset.key = 'tick' + r.id;
  tick.title = 'Take it for comparing and for the grid'; tick.setAttribute('aria-label', 'take: ' + r.title);
  tick.addEventListener('change', () => tell('tick', r.id));
  const star = button('star' + (r.star ? ' on' : ''), r.star ? '★' : '☆', (r.star ? 'Take the star away: ' : 'Give a star: ') + r.title, 'star' + r.id, () => tell('star', r.id));
  star.setAttribute('aria-pressed', r.star);
  const name = button('name', undefined, r.title, 'name' + r.id, () => tell('pick', r.id));
  name.setAttribute('aria-pressed', chosen);
  name.append(make('span', 'title', r.title), make('span', 'about', r.about));
  if (r.note) name.append(make('span', 'note', '✎ ' + r.note));
  if (r.fault) name.append(make('span', 'fault', r.fault));
  row.append(tick, star, name);
  return row;
}
function draw() {
  const d = props.value || {}, active = document.activeElement;
  const focused = root.contains(active) ? active.dataset.key : null;
  root.replaceChildren();
  if (!d.rows || !d.rows.length) { root.append(make('div', 'empty', d.hint || 'No runs yet.')); return; }
  d.rows.forEach(r => root.append(line(r, r.id === d.chosen)));
  if (focused) { const again = [...root.querySelectorAll('[data-key]')].find(e => e.dataset.key === focused); if (again) again.focus(); }
}
root.addEventListener('keydown', e => {
  const step = {ArrowDown: 1, ArrowUp: -1}[e.key], names = [...root.querySelectorAll('.name')], at = names.indexOf(document.activeElement);
  if (!step || at < 0) return;
  const next = names[at + step];
  if (next) { next.focus(); e.preventDefault(); }
});
watch('value', draw);
draw();
