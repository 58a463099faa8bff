"""The look of the report: one set of colours for light and one for dark screens.

Figures take their colours from the same variables (see :mod:`attn_kd.report.curves`), so a change
of the reader's colour scheme reaches them too. The colours of the three detectors keep apart for
colour-blind readers.
"""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --raised: #f6f7f9; --ink: #1b1f27; --muted: #5d6673; --rule: #dde1e7;
  --teacher: #59636f; --baseline: #c4651a; --student: #1769c2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171c; --raised: #1d2128; --ink: #e7eaee; --muted: #9aa4b2; --rule: #323944;
    --teacher: #a9b3c0; --baseline: #f0974a; --student: #62aaf5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3.5rem 1.5rem 5rem; max-width: 70rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
header { margin-bottom: 2.5rem; }
h1 { margin: 0 0 .5rem; font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 3.5rem 0 .5rem; font-size: 1.3rem; line-height: 1.3; letter-spacing: -.01em; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
p { max-width: 42rem; margin: .5rem 0 1rem; }
p.lead { font-size: 1.12rem; color: var(--muted); margin: 0; }
.note { color: var(--muted); font-size: .9rem; }
.warning {
  border-left: 3px solid var(--baseline); background: var(--raised); padding: .7rem 1rem;
}
.hidden {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
}
ul.findings { padding: 0; margin: 0; list-style: none; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
ul.findings li { background: var(--raised); border-radius: .6rem; padding: 1rem 1.2rem 1.1rem; }
ul.findings b { display: block; font-size: 1.75rem; line-height: 1.25; letter-spacing: -.02em; }
ul.findings span { color: var(--muted); font-size: .92rem; line-height: 1.45; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; margin: 1rem 0; }
th, td { padding: .6rem .75rem; text-align: right; vertical-align: bottom; white-space: nowrap; }
thead th { font-weight: 600; }
thead th small { display: block; font-weight: 400; color: var(--muted); font-size: .76rem;
  line-height: 1.3; white-space: normal; }
th[scope=row] { text-align: left; font-weight: 600; padding-left: 0; }
thead { border-bottom: 1.5px solid var(--ink); }
tbody tr { border-bottom: 1px solid var(--rule); }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .55em; background: currentColor; }
.teacher { color: var(--teacher); } .baseline { color: var(--baseline); }
.student { color: var(--student); }
figure { margin: 1.2rem 0 1.8rem; }
figcaption { color: var(--muted); font-size: .9rem; max-width: 42rem; margin-top: .5rem; }
figure > svg, .pair svg { width: 100%; height: auto; display: block; }
.pair { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); }
.pair figure { margin: .5rem 0; }
.frames { display: grid; gap: .55rem .7rem; margin: 1rem 0; align-items: start; }
.frames .head { font-weight: 600; font-size: .92rem; align-self: center; line-height: 1.3; }
.frames svg { width: 100%; height: auto; display: block; border-radius: .35rem;
  background: #000; }
.frames .note { line-height: 1.35; font-size: .82rem; margin: .25rem 0 0; }
.bar { display: grid; grid-template-columns: 5rem 1fr; gap: .4rem .8rem; align-items: center;
  max-width: 42rem; margin: 1rem 0; }
.bar div { height: 1.5rem; border-radius: .25rem; min-width: 3px; }
.bar span { font-size: .92rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
details summary { cursor: pointer; font-weight: 600; margin-top: 1rem; }
@media print { body { padding: 0; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""
