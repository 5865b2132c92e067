"""The signals of 2026: short relatives of on-policy distillation and of group-relative reward, one file each.

Each file is an algorithm like those next to this room: ``atod train NAME`` and ``python -m atod_algos.signals.NAME``
run it. A file of this room answers one question about the signal of a token or a turn, and takes everything else from
the method floor or from the method that it builds on.

    vopd         the sampled gap less its exact mean                       is the noise of sampling what hurts?
    opsa         a negative advantage on unlikely tokens, no teacher       does a teacher matter at all?
    iw_opd       the gap, weighted by how far the episode has drifted      by position, or by turn?
    agent_opsd   reward, weighted by how far a turn revises a belief       which turns decided?
    sign_safe    reward sets the direction, a teacher the size             may a teacher punish a good turn?
    gkd          a divergence on the teacher's top k, with a tail          which divergence?
    tropd        the gap where it can be believed, else forward KL         which of its words count?
    turn_opd     the gap, from a mean over tokens to one over turns        does a long turn shout?
    sage_opd     the gap, weighted by the teacher's confidence             does it know what it says?
    guided_opd   the gap, in episodes that a guide helps to play           does it meet states that teach?
    reopd        the gap, on single turns of stored episodes               must a student live its own episodes?
    futurebridge the gap, and the teacher's turn where it helps            does a shown turn help the next ones?
    siblings     a successful attempt of the group as privileged text      is there a better teacher already?
"""
