"""The style of the page of an evaluation: light and dark, wide and narrow screens, and paper."""

from rocr.io.svg import STYLE

PAGE_STYLE = (
    """
:root { color-scheme: light dark; --text: #222; --back: #fff; --soft: #f4f4f1; --line: #d5d5d0; --strong: #8f3300;
--warn: #fdf0e6; --quiet: #555; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --back: #16181c; --soft: #20232a; --line: #3b3f47;
--strong: #ffb27f; --warn: #34241a; --quiet: #b4b8c0; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; color: var(--text); background: var(--back); }
main { max-width: 66rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: 0 0 .25rem; }
code { font-size: .9em; color: var(--quiet); }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--strong); padding: .25rem 0 .25rem .75rem; }
.alarm { background: var(--warn); border: 1px solid var(--strong); border-radius: 6px; padding: .5rem .75rem; }
.alarm p, .alarm ul { margin: .25rem 0; } .alarm ul { padding-left: 1.25rem; }
.mark { color: var(--strong); font-weight: 600; }
.scroll { overflow-x: auto; margin: .75rem 0; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--strong); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; }
caption { text-align: left; color: var(--quiet); padding-bottom: .25rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
overflow-wrap: normal; white-space: pre-line; min-width: 3rem; max-width: 26rem; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.short { white-space: nowrap; }
td .figure { width: 8rem; display: block; margin-top: .3rem; }
figure { margin: 0; } figure .figure { width: 100%; max-width: 40rem; height: auto; }
.form { background: var(--soft); border-radius: 6px; padding: .75rem; margin: .75rem 0; }
.form p { margin: .25rem 0; }
blockquote { margin: .5rem 0; padding-left: .75rem; border-left: 3px solid var(--line); white-space: pre-line; }
dl { margin: .5rem 0; } dt { color: var(--quiet); } dd { margin: 0 0 .4rem 1rem; white-space: pre-line; }
details { border-bottom: 1px solid var(--line); padding: .35rem 0; } summary { cursor: pointer; }
.chip { display: inline-block; font-size: .85rem; font-variant-numeric: tabular-nums; padding: 0 .4rem;
background: var(--soft); border-radius: 4px; }
@media (max-width: 30rem) { main { padding: .75rem; } h1 { font-size: 1.35rem; } th, td { padding: .2rem .4rem; } }
@media print { :root { color-scheme: light; --text: #000; --back: #fff; --soft: #fff; --line: #bbb; --strong: #000;
--warn: #fff; --quiet: #333; } body { font-size: 11pt; } main { max-width: none; padding: 0; }
.scroll { overflow: visible; } .form, tr, figure { break-inside: avoid; }
details::details-content { content-visibility: visible; height: auto; } }
"""
    + STYLE
)
"""CSS of the page, the colours of its drawings included."""
