"""The style sheet of the page: system fonts, one column, light and dark. Loads nothing."""

CSS = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #ffffff; --ink: #20242b; --quiet: #68707c; --line: #dfe2e7;
  --good: #157347; --bad: #b4331f; --mark: #fdf0c4; --accent: #2f5fb3; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --card: #1b1f24; --ink: #e6e8eb; --quiet: #98a1ad;
  --line: #32383f; --good: #5cc993; --bad: #f08a78; --mark: #4a4220; --accent: #8db4f2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; font-size: 15px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
.brand { margin: 0; color: var(--accent); font-weight: 600; letter-spacing: .08em; font-size: 12px;
  text-transform: uppercase; }
h1 { margin: 2px 0 6px; font-size: 30px; line-height: 1.2; font-weight: 650; }
h2 { margin: 0 0 14px; font-size: 19px; font-weight: 620; }
h3 { margin: 0 0 8px; font-size: 14px; font-weight: 600; }
h4 { margin: 0 0 4px; font-size: 12.5px; font-weight: 600; }
.facts { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 0; margin: 0; padding: 0; color: var(--quiet);
  font-size: 13.5px; }
.facts li:not(:last-child)::after { content: "\\00b7"; margin: 0 8px; }
section { margin-top: 44px; }
summary { cursor: pointer; color: var(--quiet); }
summary h2 { display: inline; color: var(--ink); }
section > details[open] > summary { margin-bottom: 14px; }
.scroll { overflow-x: auto; max-width: 100%; margin-bottom: 26px; }
.scroll h3 { margin: 0 0 4px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
.tables { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 0 52px; }
.fine, .lead { width: 100%; }
.fine table { font-size: 12.5px; }
.lead table { width: 100%; font-size: 14.5px; }
.lead td { padding-top: 6px; padding-bottom: 6px; }
caption { caption-side: bottom; text-align: left; color: var(--quiet); font-size: 12.5px; padding-top: 7px; }
th, td { padding: 5px 14px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { color: var(--quiet); font-weight: 500; vertical-align: bottom; }
th.number, td.number { text-align: right; padding: 5px 0 5px 18px; white-space: nowrap; }
thead th.number { white-space: normal; }
td.text { white-space: pre-line; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
tr.heading th { padding-top: 16px; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .quiet { color: var(--quiet); font-weight: 400; }
.strong { font-weight: 650; }
.gallery { display: grid; grid-template-columns: repeat(auto-fit, minmax(430px, 1fr)); gap: 22px; margin-bottom: 22px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 14px 8px; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 6px; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
.compare { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  margin-bottom: 16px; }
.compare details { font-size: 12.5px; margin-bottom: 8px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 16px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; line-height: 1.45;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
@media (max-width: 560px) { main { padding: 24px 14px 60px; } .gallery { grid-template-columns: 1fr; } }
@media print { main { max-width: none; } .compare, figure, tr { break-inside: avoid; } }
"""
