"""MaxScore routing for Megatron: exactly k experts per token, no expert over its capacity.

Capital letters at the end of a name are its shape: ``loads_RE`` has the shape (R, E). They mean the
same in the whole package:

- A: arcs, experts that a contested row has or could have
- B: problems of a batch; sequences
- C: contested rows, those that a stage of the solver's finish may have to change
- D: levels of buckets
- E: experts
- F: problems that a stage of the finish looks at
- G: groups of rows
- H: hidden size
- I: metrics
- J: nodes of the graph of experts: the experts, and a sink where capacities leave slack
- K: experts per token
- L: layers
- M: swaps (moves)
- N: rows of this rank, of all problems, one problem after another
- O: outliers, rows whose range is far above that of the others
- P: experts, padded to whole vectors
- Q: rows of a kernel's tile
- R: ranks
- S: rows of one problem; positions of a sequence
- T: tokens of this rank
- U: buckets of bids
- V: vocabulary
- W: words of 64 bits of a set
- X: classes of row ranges
- Y: words that ranks send of each problem
- Z: experts of this rank
"""

__version__ = "0.1.0"
