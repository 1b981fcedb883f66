"use strict";
// Pages that update themselves: when the ledger has grown, the page fetches itself anew and replaces its
// figures and the parts that are marked data-swap.
const hidden = new Set();

function figures() {
  const data = document.getElementById("figures");
  if (data && window.Plotly) draw(JSON.parse(data.textContent), hidden);
}

function span(seconds) {
  const s = Math.max(0, Math.round(seconds)), m = Math.floor(s / 60), h = Math.floor(m / 60), d = Math.floor(h / 24);
  return d ? `${d} d ${h % 24} h` : h ? `${h} h ${m % 60} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}

function clocks() {
  const since = text => (Date.now() - Date.parse(text)) / 1000;
  document.querySelectorAll("time[data-show]").forEach(t => {
    if (t.dateTime) t.textContent = span(since(t.dateTime)) + (t.dataset.show === "ago" ? " ago" : "");
  });
  document.querySelectorAll("[data-count]").forEach(c => { c.textContent = Math.max(0, since(c.dataset.count)).toFixed(0) });
}

async function refresh() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.redirected && new URL(answer.url).pathname === "/login") return location.reload();
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  document.querySelectorAll("[data-swap]").forEach(old => {
    const made = fresh.getElementById(old.id);
    if (!made || made.innerHTML === old.innerHTML) return;
    const focused = old.contains(document.activeElement) && document.activeElement.href;
    const scrolled = [...old.querySelectorAll(".wide")].map(w => w.scrollLeft);
    const ticked = [...old.querySelectorAll("input:checked")].map(i => i.value);
    old.replaceWith(document.adoptNode(made));
    made.querySelectorAll(".wide").forEach((w, i) => { w.scrollLeft = scrolled[i] || 0 });
    made.querySelectorAll("input[type=checkbox]").forEach(i => { i.checked = ticked.includes(i.value) });
    if (focused) [...made.querySelectorAll("a")].find(a => a.href === focused)?.focus();
  });
  const [data, now] = [document.getElementById("figures"), fresh.getElementById("figures")];
  if (data && now && data.textContent !== now.textContent) { data.textContent = now.textContent; figures() }
  else if (!data && now) return location.reload(); // the first figure
  clocks();
}

function follow() {
  const { live, seen } = document.body.dataset, line = document.getElementById("line");
  if (!live) return;
  const source = new EventSource(`${live}&seen=${encodeURIComponent(seen)}`);
  let busy = false, again = false;
  source.onmessage = async () => {
    if (busy) { again = true; return }
    busy = true;
    do { again = false; await refresh().catch(() => {}); await new Promise(r => setTimeout(r, 500)) } while (again);
    busy = false;
  };
  source.onopen = () => { line.textContent = "" };
  source.onerror = () => { line.textContent = "connection lost: this page may be out of date" };
}

document.querySelectorAll(".legend button").forEach(b => b.addEventListener("click", () => {
  const on = b.getAttribute("aria-pressed") === "false";
  b.setAttribute("aria-pressed", on);
  on ? hidden.delete(b.dataset.who) : hidden.add(b.dataset.who);
  figures();
}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", figures);
figures();
clocks();
setInterval(clocks, 1000);
follow();
