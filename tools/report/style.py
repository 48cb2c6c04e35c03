"""The style sheet of a report: light, dark and print, without any outside resource."""

LIGHT = """
--page:#f6f7f9;--card:#fff;--ink:#1b1f24;--soft:#5b6470;--edge:#dde1e6;--grid:#e9ecef;--code:#f0f2f5;
--good:#116932;--good-back:#e5f5ea;--bad:#a8141c;--bad-back:#fdeaea;--none:#6b5300;--none-back:#fdf5dc;
--s0:#1f6fd6;--s1:#d9660f;--s2:#12866b;--s3:#a23bb0;--s4:#8a6d00;--s5:#c8244f;"""

DARK = """
--page:#14171b;--card:#1c2026;--ink:#e7eaee;--soft:#a0a9b4;--edge:#333a43;--grid:#2a3038;--code:#272d35;
--good:#7fdc9c;--good-back:#15301f;--bad:#ff9a9a;--bad-back:#3d181b;--none:#e8cf7a;--none-back:#332c13;
--s0:#62a8ff;--s1:#ff9f55;--s2:#45cfa9;--s3:#dd8bea;--s4:#d9bb4a;--s5:#ff7d9c;"""

RULES = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink)}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 40px}
h1{font-size:26px;line-height:1.25;margin:0 0 16px;overflow-wrap:anywhere}
h2{font-size:18px;margin:32px 0 10px}
h3{font-size:15px;margin:0 0 6px}
.banner{border-radius:8px;padding:13px 16px;font-weight:600;border-left:5px solid;overflow-wrap:anywhere}
.banner p{margin:4px 0 0;font-weight:400}
.good{color:var(--good);background:var(--good-back)}
.bad{color:var(--bad);background:var(--bad-back)}
.none{color:var(--none);background:var(--none-back)}
.card,figure{background:var(--card);border:1px solid var(--edge);border-radius:8px}
.card{overflow-x:auto}
.card table{min-width:680px}
details .card table{min-width:0}
figure{margin:0;padding:14px 16px 12px;min-width:0}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:16px}
.wide{grid-column:1/-1}
.plot{overflow-x:auto}
.chart{display:block;width:100%;height:auto;overflow:visible}
.wide .chart{min-width:680px}
.chart text{fill:var(--soft);font-variant-numeric:tabular-nums;font-family:inherit}
.chart .unit{font-style:italic}
.grid{stroke:var(--grid)}
.axis{stroke:var(--soft)}
.mark{stroke:var(--c,var(--soft));stroke-width:1.5;stroke-dasharray:4 3}
.foot,.head{stroke-dasharray:none}.skipped{--c:var(--bad)}
.line{fill:none;stroke:var(--c);stroke-linejoin:round;stroke-linecap:round}
.band{stroke:color-mix(in srgb,var(--c) 40%,var(--card))}
.dense{stroke:color-mix(in srgb,var(--c) 65%,var(--card))}
.dashed{stroke-dasharray:6 4}
.dotted{stroke-dasharray:2 3}
.dot{fill:var(--c)}
.hollow{fill:var(--card);stroke:var(--c);stroke-width:1.6}
.c0{--c:var(--s0)}.c1{--c:var(--s1)}.c2{--c:var(--s2)}.c3{--c:var(--s3)}.c4{--c:var(--s4)}.c5{--c:var(--s5)}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:0 0 8px;padding:0;font-size:13px}
.legend li{display:flex;align-items:center;gap:7px;overflow-wrap:anywhere}
.legend svg{flex:none}
figcaption{font-size:13px;color:var(--soft);overflow-x:auto}
figcaption p{margin:6px 0 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:left;vertical-align:top;border-top:1px solid var(--grid);overflow-wrap:break-word}
.any{overflow-wrap:anywhere}
tr:first-child>*{border-top:0}
.card th[scope=col]{font-size:13px;color:var(--soft);white-space:nowrap}
th{font-weight:600}
td.number,th.number{text-align:right;white-space:nowrap}
.numbers td,.numbers th{padding:3px 8px;text-align:right;border-top:1px solid var(--grid);white-space:nowrap}
.numbers th{font-weight:400}
.numbers td{color:var(--ink)}
.numbers th:first-child{text-align:left;padding-left:0;white-space:normal;min-width:7em}
.badge{display:inline-block;border-radius:4px;padding:0 8px;font-weight:600;font-size:13px;white-space:nowrap}
code{font:13px/1.45 ui-monospace,"SF Mono",Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
td code{display:inline-block;min-width:7em}
.bar{display:block;width:120px;height:10px}
.bar rect{fill:var(--s0)}
.bar .rest{fill:var(--grid)}
details{margin-top:10px}
summary{cursor:pointer;color:var(--soft);font-size:14px}
details .card{margin-top:8px}
footer{margin-top:32px;color:var(--soft);font-size:13px;overflow-wrap:anywhere}
@media print{body{background:#fff;font-size:12px}main{max-width:none;padding:0}
.figures{grid-template-columns:1fr 1fr;gap:10px}.card table,.wide .chart{min-width:0}
.card table,.numbers,figcaption,.badge,code,.card th[scope=col]{font-size:10px}.card th[scope=col]{white-space:normal}
.card td,.card th{padding:3px 6px}.numbers td,.numbers th{padding:2px 3px}.numbers th:first-child{min-width:0}
.card,figcaption{overflow:visible}
figure,.banner,tr{break-inside:avoid}h2{break-after:avoid}
.banner,.badge,.bar,.chart,.legend{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

# Print stays light: dark paper helps nobody.
CSS = f":root{{{LIGHT}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}{RULES}"
