// Draws the list of models of panels/models_view.py. Gradio runs this body with `element`, `props`, `trigger`, `watch`.
const root = element.querySelector('.models');
let drawn = '';
function tell(act, name) { trigger('select', {act: act, name: name}); }
function button(text, act, r) {
  const b = make('button', 'act', text);
  b.type = 'button'; b.dataset.key = act + r.ask; b.dataset.act = act; b.setAttribute('aria-label', text + ' ' + r.name);
  b.addEventListener('click', () => { b.disabled = true; tell(act, r.ask); setTimeout(() => { b.disabled = false; }, 1500); });
  return b;
}
function line(r) {
  const row = make('div', 'model-row' + (r.held ? ' held' : '') + (r.ready ? '' : ' away')), what = make('div', 'what'), facts = make('div', 'facts');
  row.setAttribute('role', 'listitem'); row.dataset.name = r.name;
  const name = make('div', 'name');
  name.append(make('b', '', r.name), make('span', 'kind', r.kind));
  what.append(name, make('div', 'about', r.fault || r.about));
  facts.append(make('span', 'chip ' + (r.held ? 'held' : r.ready ? 'ready' : 'away'), r.held || (r.ready ? 'ready offline' : r.fault ? 'damaged' : 'not on this machine')));
  if (r.size) facts.append(make('span', 'chip', r.size));
  facts.append(make('span', 'chip', r.licence === 'yours' ? 'your own' : r.licence));
  if (r.need) facts.append(make('span', 'chip fit-' + r.fits.replace(' ', '-'), r.need));
  what.append(facts);
  row.append(what);
  if (r.fault) return row;
  if (r.held) row.append(button('Unload', 'unload', r));
  else if (r.ready) row.append(button('Load', 'load', r));
  else row.append(r.coming ? make('span', 'chip', 'coming …') : button('Download …', 'fetch', r));
  return row;
}
function draw() {
  const d = props.value || {}, now = JSON.stringify(d);
  if (now === drawn) return;
  drawn = now;
  const active = document.activeElement, focused = root.contains(active) ? active.dataset.key : null;
  root.replaceChildren();
  if (!d.rows) { root.append(make('div', 'empty', 'Looking at what is here …')); return; }
  const here = d.rows.filter(r => r.ready || r.fault), away = d.rows.filter(r => !r.ready && !r.fault);
  root.append(make('h3', '', 'Ready offline'), ...here.map(line), make('h3', '', 'Can be downloaded'), ...away.map(line));
  if (focused) { const again = [...root.querySelectorAll('[data-key]')].find(e => e.dataset.key === focused); if (again) again.focus(); }
}
watch('value', draw);
draw();
// How things stand: at once when the panel is opened, then every two seconds while somebody looks.
let asked = 0;
setInterval(() => {
  const seen = element.offsetParent !== null && document.visibilityState === 'visible', now = Date.now();
  if (seen && now - asked > 2000) { asked = now; tell('see', ''); }
  if (!seen) asked = 0;
}, 250);
