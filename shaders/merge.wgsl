// merge: the parts of the key axis into one, in their order: O = sum 2^(m_s - m) O_s / sum 2^(m_s - m) l_s.
//
//   one thread: one column of one row; a row that sees no key is zeros
{% if F16 %}
enable f16;
{% endif %}
{% set buffers = [["parts", "read", "f32"], ["o", "read_write", O_TYPE]] %}
{% include "shared/problem.wgsl" %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = workgroup_index(group, groups) * 64u + thread;
    if (index >= P.batch * P.heads * P.q_len * P.value_dim) { return; }
    let d = index % P.value_dim;
    let row = index / P.value_dim;
    let i = row % P.q_len;
    let h = row / P.q_len % P.heads;
    let b = row / (P.q_len * P.heads);
    let stride = P.value_dim + 2u;
    let at = row * P.splits * stride;
    var top = NEVER;
    for (var s = 0u; s < P.splits; s += 1u) { top = max(top, parts[at + s * stride + P.value_dim]); }
    var sum = 0.0;
    var l = 0.0;
    for (var s = 0u; s < P.splits; s += 1u) {
        let part = at + s * stride;
        let weight = exp2(parts[part + P.value_dim] - top);
        l += weight * parts[part + P.value_dim + 1u];
        sum += weight * parts[part + d];
    }
    o[P.o_at.x + b * P.o_at.y + h * P.o_at.z + i * P.o_at.w + d] = {{ O_TYPE }}(select(0.0, sum / max(l, 1.0e-30), l > 0.0));
}
