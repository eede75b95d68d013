// block_map: which tiles of BLOCK_Q rows by BLOCK_K keys of a KV head's group hold an element that the mask allows.
//
//   one workgroup a tile: any(allowed); the tile's word is 1 or 0
{% set buffers = [["block_map", "read_write", "u32"]] %}
{% include "shared/problem.wgsl" %}
{% include "shared/score.wgsl" %}

const BLOCK_Q = {{ BLOCK_Q }}u;
const BLOCK_K = {{ BLOCK_K }}u;

var<workgroup> wg_any: atomic<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = P.block_from + workgroup_index(group, groups);
    if (index >= P.count) { return; }
    let per_kv = P.heads / P.kv_heads;
    let tile = index % P.k_blocks;
    let n = index / P.k_blocks % P.blocks;
    let kh = P.kv_from + index / (P.k_blocks * P.blocks);
    let block = block_at(n, BLOCK_Q, per_kv);
    if (block.x >= P.batch) { return; }
    if (thread == 0u) { atomicStore(&wg_any, 0u); }
    workgroupBarrier();
    let b = block.x;
    let queries = q_count(b);
    let length = kv_length(kv_row(b));
    let start = q_position(b, length);
    for (var cell = thread; cell < BLOCK_Q * BLOCK_K; cell += 64u) {
        let row = block.y + cell / BLOCK_K;
        let j = tile * BLOCK_K + cell % BLOCK_K;
        if (row < queries * per_kv) {
            let h = kh * per_kv + row / queries;
            let i = row % queries;
            if (in_range(keys_of(b, start + i32(i), length), j) && allowed(b, h, i, j)) { atomicStore(&wg_any, 1u); }
        }
    }
    workgroupBarrier();
    if (thread == 0u) { block_map[index] = atomicLoad(&wg_any); }
}
