"""Signatures of the operators, as the dispatcher and the compiled library know them.

The compiled library carries the SHA-256 of this file: one that was built for other signatures is refused on import,
because a boxed kernel would misread its arguments. `saved`, an output of the FFN operators, is what backward needs:
(P, N, K), P = 1 for a plain FFN and 2 for a gated one, or empty if nothing was to be saved. `neurons`, (K,) int64, are
the rows of the weights that are used, in that order; without it all are.
"""

SCHEMAS = {
    "neuron_saliency": "(Tensor[] w_in, Tensor[] w_gate, Tensor[] w_out) -> Tensor",
    "inactivity_count": "(Tensor z, Tensor? mask, str activation, float eps) -> Tensor",
    "sub_ffn": """(
        Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_gate, Tensor? b_gate, Tensor w_out, Tensor? b_out,
        Tensor? neurons, Tensor? mask, str activation, float eps, bool count, bool save, bool compact
    ) -> (Tensor y, Tensor saved, Tensor counts)""",
    "sub_ffn_backward": """(
        Tensor grad_y, Tensor saved, Tensor w_in, Tensor? w_gate, Tensor w_out, Tensor? neurons, str activation,
        bool compact
    ) -> Tensor""",
    "sub_ffn_train": """(
        Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_gate, Tensor? b_gate, Tensor w_out, Tensor? b_out,
        Tensor updated_in, Tensor? updated_b_in, Tensor? updated_gate, Tensor? updated_b_gate, Tensor updated_out,
        str activation, bool save
    ) -> (Tensor y, Tensor saved)""",
    "sub_ffn_train_backward": """(
        Tensor grad_y, Tensor x, Tensor saved, Tensor w_in, Tensor? w_gate, Tensor w_out,
        SymInt updated, str activation, bool input_grad
    ) -> (
        Tensor grad_x, Tensor grad_in, Tensor grad_b_in, Tensor grad_gate, Tensor grad_b_gate, Tensor grad_out,
        Tensor grad_b_out
    )""",
    "activation_moments": """(
        Tensor(a!) total, Tensor(b!) second, Tensor x, Tensor w_in, Tensor? b_in, Tensor? w_gate, Tensor? b_gate,
        Tensor? shares, Tensor? mask, str activation
    ) -> ()""",
    "alignment_loss": "(Tensor student, Tensor teacher, Tensor? mask) -> (Tensor loss, Tensor inverse_energy)",
    "alignment_loss_backward": """(
        Tensor grad, Tensor inverse_energy, Tensor student, Tensor teacher, Tensor? mask
    ) -> Tensor""",
    "quantize_blocks": "(Tensor x, int block) -> (Tensor q, Tensor scales)",
    "dequantize_accumulate": "(Tensor(a!) total, Tensor q, Tensor scales, float weight, int block) -> ()",
    "mask_update": """(
        Tensor(a!) words, Tensor(b!) odd, Tensor before, Tensor after, Tensor streams, int added, float scale,
        float bound
    ) -> ()""",
}
