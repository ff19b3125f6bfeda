"""What CRATE's layers do to its tokens, measured: coding rates, sparsity, coherence, attention.

    with whitebox.trace(model) as t:
        model(x)
    print(t.table())

Reading order: measures.py (the formulas), places.py (where tokens can be seen), tracing.py,
report.py; inspect.py is the command. Derivations: docs/whitebox.md.
"""

from .measures import (
    attention_rows,
    coding_rate,
    compressed_rate,
    sparsity,
    subspace_coherence,
)
from .report import Row, Table
from .tracing import Trace, trace

__all__ = [
    "Row",
    "Table",
    "Trace",
    "attention_rows",
    "coding_rate",
    "compressed_rate",
    "sparsity",
    "subspace_coherence",
    "trace",
]
