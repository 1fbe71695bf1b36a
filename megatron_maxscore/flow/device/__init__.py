"""The engine of bounded mode: one kernel launch from scores to a certified assignment.

1. **Sweeps.** Every row takes the K experts of the highest reduced score, which is its score less
   the expert's price. From counts of how many rows would change their mind within some distance
   follows, for each expert, by how much its price has to move. Steps are 1.5 times as long as that
   and combined by Anderson's method; 4 to 9 sweeps leave about a thousandth of the units over.
   Where rows are alike they change their minds together: a perturbation that depends on row and
   expert alone parts them, a larger one where sweeps do not get on.
2. **Rounds.** Every row offers its cheapest swap of an expert that has too many rows for one that
   has room, or that can pass a row on. An offer that is the best in its slot at both experts is
   made. Nobody gives more than it has too many, and nobody takes more than it has room for, so the
   assignment is feasible in the end.
3. **Conclusion.** At the final prices, without the perturbation: what each row would have got at
   most, less what it got, is its part of the certified gap.
4. **Order.** Assignments are numbered by expert, then by row, as tokens are dispatched.

Sweeps, rounds, conclusion and order are phases of one launch, with a barrier between them where the
driver lets a launch's programs wait for each other, and launches of their own elsewhere. What
crosses programs are integer sums and maxima, so the result does not depend on their number.

With Triton's interpreter (``TRITON_INTERPRET=1``) the same kernel runs on the CPU, slowly.
"""
