"""The style sheet of the report: system fonts, light and dark, one column on a phone."""

STYLE = """
:root { color-scheme: light dark;
  --ground: #fbfbfa; --sheet: #ffffff; --ink: #1b1f24; --soft: #5c6670; --line: #e1e4e8;
  --good: #1a7f4b; --bad: #c2322d; --doubt: #9a6700; --good-ground: #e6f4ec; --bad-ground: #fdebea;
    --doubt-ground: #fff5dc;
  --eager: #9aa3ad; --peer: #6f8bb0; --ours: #0b7a75; --ours-1: #2a9d8f; --ours-2: #e08e45; --ours-3: #c8553d;
    --vllm: #7b57b2; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171a; --sheet: #1c2024; --ink: #e6e9ec; --soft: #9aa4ae; --line: #31373d;
  --good: #4cc38a; --bad: #ff7b72; --doubt: #e3b341; --good-ground: #16301f; --bad-ground: #3a1d1d;
    --doubt-ground: #33290f;
  --eager: #77818b; --peer: #7f9cc4; --ours: #2fb5ad; --ours-1: #5fd0c0; --ours-2: #f0a860; --ours-3: #e77a62;
    --vllm: #a88bdd; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
h4 { font-size: .9rem; margin: 0 0 .5rem; font-weight: 600; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.soft, .caption, .note { color: var(--soft); }
.caption { font-size: .8rem; margin-top: .5rem; }
.note { font-weight: 400; }
code { font: .86em ui-monospace, "Cascadia Mono", Menlo, monospace; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .88rem; margin: .75rem 0 0; }
a { color: var(--ours); text-underline-offset: 2px; }
.verdict { border-radius: 8px; padding: .9rem 1.1rem; margin: 1rem 0; border-left: 5px solid; }
.verdict p { margin: .2rem 0; max-width: none; } .verdict strong { font-size: 1.12rem; }
.verdict.pass { border-color: var(--good); background: var(--good-ground); }
.verdict.fail { border-color: var(--bad); background: var(--bad-ground); }
.verdict.inconclusive { border-color: var(--doubt); background: var(--doubt-ground); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { background: var(--sheet); border: 1px solid var(--line); border-radius: 8px; padding: .75rem .9rem; }
.tile .figure { font-size: 1.55rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile .what { font-size: .85rem; } .tile .why { font-size: .8rem; color: var(--soft); margin-top: .2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .9rem;
  margin: .8rem 0; }
.chart { margin: 0; background: var(--sheet); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem .9rem; min-width: 0; }
.bar-row { display: grid; grid-template-columns: 7.5rem minmax(4rem, 1fr) 9.5rem; gap: .5rem; align-items: center;
  font-size: .82rem; }
.bar-label { text-align: right; color: var(--soft); overflow-wrap: anywhere; line-height: 1.15; }
.bar-text { font-variant-numeric: tabular-nums; } .bar-text b { font-weight: 600; }
.bar-plot { line-height: 0; }
svg .eager { fill: var(--eager); } svg .peer { fill: var(--peer); } svg .vllm { fill: var(--vllm); }
svg .ours-0 { fill: var(--ours); }
svg .ours-1 { fill: var(--ours-1); }
svg .ours-2 { fill: var(--ours-2); }
svg .ours-3 { fill: var(--ours-3); }
svg .dot { fill: var(--ink); opacity: .55; }
svg .edge { fill: none; stroke: var(--soft); stroke-width: 1.3; opacity: .6; }
svg .node { fill: var(--ground); stroke: var(--line); }
svg .name { font: 600 13px system-ui, sans-serif; fill: var(--ink); }
svg .id { font: 11px ui-monospace, Menlo, monospace; fill: var(--soft); }
.graph { padding: .6rem .7rem; } .graph svg { display: block; width: 100%; min-width: 52rem; height: auto; }
svg .whisker { stroke: var(--ink); stroke-width: 1.2; opacity: .55; }
.scroll { overflow-x: auto; margin: .7rem 0; background: var(--sheet); border: 1px solid var(--line);
  border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
th, td { text-align: left; padding: .42rem .75rem; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pass-text { color: var(--good); }
.fail-text { color: var(--bad); }
.inconclusive-text { color: var(--doubt); }
.info-text { color: var(--soft); }
details { margin: .8rem 0; } summary { cursor: pointer; font-size: .92rem; }
.chain { list-style: none; margin: .8rem 0; padding: 0; }
.chain li { position: relative; padding: 0 0 .9rem 1.5rem; }
.chain li::before { content: ""; position: absolute; left: .3rem; top: .45rem; width: .6rem; height: .6rem;
  border-radius: 50%; background: var(--ours); }
.chain li::after { content: ""; position: absolute; left: .56rem; top: 1.1rem; bottom: -.4rem; width: 2px;
  background: var(--line); }
.chain li:last-child::after { display: none; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .9rem;
  margin: .8rem 0; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
dl.compact { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .5rem 1rem;
  font-size: .88rem; margin: 1rem 0; }
dl.compact dt { color: var(--soft); font-size: .8rem; line-height: 1.25; }
dl.compact dd { margin: 0; font-variant-numeric: tabular-nums; }
@media (max-width: 560px) {
  main { padding: 1rem .9rem 3rem; } h1 { font-size: 1.4rem; }
  .bar-row { grid-template-columns: 5.4rem minmax(2.5rem, 1fr) 7.2rem; gap: .4rem; font-size: .76rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .tile { padding: .6rem .65rem; }
  .tile .figure { font-size: 1.25rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: .5rem; }
  dl.compact { grid-template-columns: 1fr 1fr; }
}
"""
