"""The report's page as a Jinja template of HTML, style and script, filled by `server/reporting/report.py`.

The console (`server/dashboard`) uses the macros, the style and the script too. They are strings in a module
rather than files beside it because a Flower app bundle carries modules only. Colours are CSS variables, also
inside the plots: the script replaces ``var(--x)`` in the figures before it draws them, and draws again when
the reader's colour scheme changes. The centres' colours follow the palette for the colour-blind of Okabe and
Ito; their markers differ too.
"""

TEMPLATE_MACROS = """\
{%- macro class_attribute(name) -%}{% if name %} class="{{ name }}"{% endif %}{%- endmacro -%}
{%- macro header_cell(h) -%}
{%- if h.column_span > 1 %}<th colspan="{{ h.column_span }}" class="group" scope="col">{{ h.text }}</th>
{%- else %}<th{{ class_attribute("n" if h.is_numeric else "") }} scope="col">{{ h.text }}</th>{% endif %}
{%- endmacro -%}
{%- macro body_cell(c) -%}
<td{{ class_attribute(c.css_class) }}{% if c.tooltip %} title="{{ c.tooltip }}"{% endif %}>{{ c.text }}
{%- if c.subtext %} <small>{{ c.subtext }}</small>{% endif %}</td>
{%- endmacro -%}
{%- macro grid(t) -%}
<div class="wide" tabindex="0"><table>
{%- if t.caption %}<caption>{{ t.caption }}</caption>{% endif %}
<thead>{% for row in t.header_rows %}<tr>
{%- for h in row %}{{ header_cell(h) }}{% endfor %}</tr>{% endfor %}</thead>
<tbody>{% for row in t.rows %}<tr{{ class_attribute(row.css_class) }}>
{%- for c in row.cells %}{% if loop.first %}<th scope="row"><span>{{ c.text }}</span></th>
{%- else %}{{ body_cell(c) }}{% endif %}{% endfor %}</tr>{% endfor %}</tbody></table></div>
{%- if t.notes %}<p class="note">
{%- for n in t.notes %}{{ n }}{% if not loop.last %}<br>{% endif %}{% endfor %}</p>{% endif %}
{%- endmacro -%}
{%- macro plots(figures) -%}
<div class="plots">{% for f in figures %}<figure><figcaption>{{ f.title }}</figcaption>
<div class="plot" id="{{ f.id }}" role="img" aria-label="{{ f.title }}"></div></figure>{% endfor %}</div>
{%- endmacro -%}
"""

REPORT_CSS = """\
:root { color-scheme: light dark; --paper:#fff; --ink:#1b2026; --soft:#5c6670; --line:#dfe3e7; --wash:#f5f7f8;
 --accent:#0a64a4;
 --c0:#0072b2; --c1:#d55e00; --c2:#009e73; --c3:#b8558f; --c4:#d08c00; --c5:#45a5de; --c6:#7a6a4f; }
@media (prefers-color-scheme: dark) { :root { --paper:#14181c; --ink:#e4e8eb; --soft:#9aa5af; --line:#2e353c;
 --wash:#1b2026;
 --accent:#6cb6f0; --c0:#4a9fe0; --c1:#f07f3c; --c2:#26bb8f; --c3:#d98ab8; --c4:#e8b13a; --c5:#9bd6fb;
 --c6:#b8a684; } }
* { box-sizing:border-box }
body { margin:0 auto; padding:28px 24px 60px; max-width:1180px; background:var(--paper); color:var(--ink);
 font:14px/1.45 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif;
 font-variant-numeric:tabular-nums }
h1 { font-size:22px; line-height:1.25; margin:0; font-weight:600; overflow-wrap:anywhere }
h2 { font-size:16px; margin:38px 0 8px; padding-top:10px; border-top:1px solid var(--line); font-weight:600 }
h3 { font-size:14px; margin:20px 0 6px; font-weight:600; overflow-wrap:anywhere }
p { margin:4px 0 10px; max-width:96ch; overflow-wrap:anywhere }
small, .note, .meta, caption, figcaption { color:var(--soft) }
.note { font-size:12.5px } .meta { margin:6px 0 0; max-width:none }
.status { display:inline-block; margin-right:8px; padding:1px 9px; border:1px solid var(--soft);
 border-radius:9px; color:var(--ink) }
.status.finished { border-color:var(--accent); color:var(--accent) }
.numbers { display:flex; flex-wrap:wrap; gap:10px 34px; margin:22px 0 4px }
.numbers div { min-width:90px; max-width:280px } .numbers b { display:block; font-size:30px; font-weight:500;
 line-height:1.15 }
.numbers div:first-child b { color:var(--accent) } .numbers small { overflow-wrap:anywhere; display:block }
.wide { overflow-x:auto; margin:6px 0 }
table { border-collapse:collapse; min-width:min(100%, 420px) }
caption { text-align:left; padding:0 0 4px; font-size:13px }
th, td { padding:3px 9px 3px 0; text-align:left; vertical-align:baseline; border-bottom:1px solid var(--line);
 font-weight:400 }
thead th { color:var(--soft); font-size:12.5px; vertical-align:bottom; border-bottom-color:var(--soft) }
th.group { text-align:center; border-bottom:1px solid var(--line) }
thead tr:not(:last-child) th:not(.group) { border:0 }
tbody th span { display:block; max-width:270px; overflow-wrap:break-word }
td.n, th.n { text-align:right; padding-left:9px } td.n { white-space:nowrap }
td.n small { display:block; white-space:normal; overflow-wrap:break-word; max-width:120px; margin-left:auto;
 line-height:1.2 }
td.none { text-align:right; color:var(--soft); font-style:italic; font-size:12px; padding-left:9px;
 min-width:86px; line-height:1.2 }
td.text, th:not(:first-child):not(.n):not(.group) { padding-left:9px }
td.text { max-width:520px; overflow-wrap:anywhere; min-width:70px }
tr.view th { white-space:nowrap }
tr.view th, tr.view td { background:var(--wash) }
tr.first th, tr.first td { border-top:1px solid var(--soft) }
.plots { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap:14px 26px }
figure { margin:8px 0 0; min-width:0 } figcaption { font-size:13px; overflow-wrap:anywhere }
 .plot { height:270px }
.legend { position:sticky; top:0; z-index:5; display:flex; flex-wrap:wrap; gap:4px 6px; padding:8px 0;
 background:var(--paper);
 max-height:96px; overflow-y:auto; border-bottom:1px solid var(--line) }
.legend button { font:inherit; font-size:12.5px; color:var(--ink); background:none; border:0;
 padding:1px 8px 1px 2px; cursor:pointer;
 max-width:240px; overflow:hidden; text-overflow:ellipsis; white-space:nowrap; border-radius:4px }
.legend button:hover { background:var(--wash) } .legend button[aria-pressed=false] { opacity:.35;
 text-decoration:line-through }
.legend button:focus-visible { outline:2px solid var(--accent) }
.legend i { display:inline-block; width:22px; margin-right:5px; vertical-align:middle; border-top:3px solid }
.legend i[style*=double] { border-top-width:5px }
pre { background:var(--wash); padding:12px 14px; overflow:auto; max-height:560px; font-size:12.5px;
 line-height:1.4 }
summary { cursor:pointer; color:var(--accent) }
@media print { .legend { position:static } body { max-width:none; padding:0 } }
"""

PLOT_SCRIPT = """\
function merge(a, b) {
  for (const k in b) a[k] = b[k] && b[k].constructor === Object ? merge({...a[k]}, b[k]) : b[k];
  return a;
}
function draw(figures, hidden) {
  const css = getComputedStyle(document.documentElement);
  const axis = {
    gridcolor:"var(--line)", linecolor:"var(--soft)", zeroline:false, automargin:true, showline:true,
    ticks:"outside", ticklen:3, tickcolor:"var(--soft)", title:{standoff:8, font:{size:12}}
  };
  const family = "system-ui, -apple-system, Segoe UI, Liberation Sans, Arial, sans-serif";
  const base = {
    paper_bgcolor:"rgba(0,0,0,0)", plot_bgcolor:"rgba(0,0,0,0)", showlegend:false,
    margin:{l:48, r:12, t:12, b:40}, hovermode:"closest", font:{family, size:11.5, color:"var(--soft)"},
    hoverlabel:{
      bgcolor:"var(--paper)", bordercolor:"var(--soft)", font:{color:"var(--ink)"}, namelength:30
    }
  };
  for (const [id, figure] of Object.entries(figures)) {
    const layout = merge({...base, xaxis:{...axis}, yaxis:{...axis}}, figure.layout);
    const data = figure.data.map(t => ({...t, visible: !hidden.has(String(t.meta))}));
    const colour = (_, name) => css.getPropertyValue(name).trim();
    const ready = JSON.parse(JSON.stringify({data, layout}).replace(/var\\((--\\w+)\\)/g, colour));
    Plotly.react(id, ready.data, ready.layout, {displayModeBar:false, responsive:true});
  }
}
"""

REPORT_TEMPLATE = (
    TEMPLATE_MACROS
    + """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:">
<title>{{ page.title }}</title>
<style>
"""
    + REPORT_CSS
    + """</style></head><body>
<header><h1>{{ page.heading }}</h1>
<p class="meta"><span class="status {{ page.status }}">{{ page.status }}</span>
{{- page.facts|join(" · ") }}</p></header>
{% for note in page.notes %}<p>{{ note }}</p>{% endfor %}
{% if page.headline %}<div class="numbers">{% for n in page.headline %}<div>
<small>{{ n.label }}</small><b>{{ n.value }}</b><small>{{ n.subtext }}</small></div>{% endfor %}</div>
<p class="note">{{ page.headline_note }}</p>{% endif %}
<main>
<h2>Results by centre</h2>
{% for t in tables.scores %}{{ grid(t) }}{% else %}
<p>There are no test results: the test scans are used once, when a run has finished.</p>{% endfor %}
{% if page.legend %}<div class="legend" aria-label="Centres: press to show or hide">
{%- for entry in page.legend -%}
<button data-who="{{ loop.index0 }}" aria-pressed="true" title="{{ entry.name }}">
{#- -#}
<i style="border-top-style:{{ entry.border_style }};border-color:var(--c{{ entry.colour }})"></i>
{{- entry.name }}</button>{% endfor %}</div>{% endif %}
<noscript><p>The plots need JavaScript, which is part of this file; the tables do not.</p></noscript>
{% if figures.scores %}{{ plots(figures.scores) }}
<p class="note">Both are computed from histograms of scores by true class; no scan's own score leaves its
 centre. In the calibration plot, larger marks stand for more scans.</p>{% endif %}
{% if figures.cross_site %}<h2>Each centre's own model at every centre</h2>
<p>On validation scans. A centre's own model is the global model plus that centre's update of the last
 round.</p>
{{ plots(figures.cross_site) }}{% endif %}
{% if tables.stages.rows %}<h2>Stages and rounds</h2>{{ grid(tables.stages) }}
{%- if page.sampling_note %}<p class="note">{{ page.sampling_note }}</p>{% endif %}
{{- plots(figures.rounds) }}{% endif %}
{% if figures.weights %}<h2>Weights of the centres</h2>
<p>Each centre's weight in the average of each parameter group. The effective number of centres is
 1 / Σ w².</p>
{{ plots(figures.weights) }}{{ grid(tables.weights) }}{% endif %}
<h2>Scans</h2>
{% for t in tables.label_counts %}{{ grid(t) }}{% else %}<p>No counts were reported.</p>{% endfor %}
{% if tables.centres.rows %}<h3>The centres</h3>{{ grid(tables.centres) }}{% endif %}
{% if tables.drift.rows %}<h3>What the scans look like</h3>
<p>A histogram over each centre's scans; every scan counts once.</p>
{{ plots(figures.image_statistics) }}{{ grid(tables.drift) }}{% endif %}
{% if figures.costs %}<h2>Time and traffic</h2>{{ plots(figures.costs) }}{{ grid(tables.costs) }}{% endif %}
{% if tables.privacy.rows %}<h2>Privacy</h2>{{ grid(tables.privacy) }}{% endif %}
<h2>Contributions left out</h2>
{% if tables.exclusions.rows %}{{ grid(tables.exclusions) }}{% else %}
<p>None: every contribution that arrived was used.</p>{% endif %}
<h2>Configuration</h2>
<details><summary>{{ page.config.count("\\n") }} lines</summary><pre>{{ page.config }}</pre></details>
</main>
<script>{{ plotly }}</script>
<script type="application/json" id="figures">{{ figure_data }}</script>
<script>
"""
    + PLOT_SCRIPT
    + """
const figures = JSON.parse(document.getElementById("figures").textContent), hidden = new Set();
const show = () => draw(figures, hidden);
show();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
document.querySelectorAll(".legend button").forEach(b => b.addEventListener("click", () => {
  const on = b.getAttribute("aria-pressed") === "false";
  b.setAttribute("aria-pressed", on);
  on ? hidden.delete(b.dataset.who) : hidden.add(b.dataset.who);
  show();
}));
</script></body></html>
"""
)
