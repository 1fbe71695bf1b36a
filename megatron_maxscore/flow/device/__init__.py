"""The engine of bounded mode: one kernel launch from scores to a certified assignment.

1. **Sweeps.** Every row takes the K experts with the highest reduced score, which is the score
   minus the expert's price. For each expert, the kernel counts how many rows are within some
   distances of changing their mind. These counts tell by how much the price has to move. Steps are
   1.5 times as long as that and are combined by Anderson's method. After 4 to 9 sweeps about a
   thousandth of the units overflows. Rows that are alike change their minds together. A small
   perturbation, which depends on row and expert alone, tells them apart; it is raised where sweeps
   make no progress.
2. **Rounds.** Every row offers its cheapest swap: it gives an expert that has too many rows and
   takes one that has room, or that can pass a row on. A swap is made if its offer is the best in
   its slot at both experts. No expert gives more rows than it has too many, and none takes more
   than it has room for, so the assignment is feasible in the end.
3. **Conclusion.** The gap is certified at the final prices, without the perturbation. A row's part
   of it is the most that the row could have got minus what it got.
4. **Order.** Assignments are numbered by expert, then by row, as tokens are dispatched.

If the programs of a launch can wait for each other, all this is one launch, and sweeps, rounds,
conclusion and order are its phases, with a barrier between them. Otherwise phases are launches of
their own. Programs exchange only integer sums and maxima, so the result does not depend on how many
programs there are.

With Triton's interpreter (``TRITON_INTERPRET=1``) the same kernel runs on the CPU, slowly.
"""
