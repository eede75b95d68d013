// pack: a small table, word by word, to its place among the packed ones, which a kernel binds as one.
//
//   one thread: one word
{% set SOFTWARE, RAGGED_Q, RAGGED_K, HAS_KV_LEN, HAS_ROWS, PAGE, TABLES, PACKED = [false, false, false, false, false, 0, [], []] %}
{% set buffers = [["table", "read", "u32"], ["packed", "read_write", "u32"]] %}
{% include "shared/problem.wgsl" %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = (P.block_from + workgroup_index(group, groups)) * 64u + thread;
    if (index < P.count) { packed[index] = table[index]; }
}
