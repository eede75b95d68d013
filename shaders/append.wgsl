// append: the keys and values of this step into the cache, at each row's position.
//
//   qkv [R, (H + 2 Hk) D] -> k_cache, v_cache [R, Hk, L, D] at position lengths[r] - 1
{% if F16 %}
enable f16;
{% endif %}
struct Params {
    rows: u32, kv_heads: u32, head_dim: u32, capacity: u32,
    qkv_stride: u32, k_offset: u32, v_offset: u32, pad: u32,
}
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> qkv: array<{{ T }}>;
@group(0) @binding(2) var<storage, read> lengths: array<u32>;               // [R], this token included
@group(0) @binding(3) var<storage, read_write> k_cache: array<{{ T }}>;
@group(0) @binding(4) var<storage, read_write> v_cache: array<{{ T }}>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let width = P.kv_heads * P.head_dim;
    let index = (group.y * groups.x + group.x) * 64u + thread;
    if (index >= P.rows * width) { return; }
    let row = index / width;
    let channel = index % width;
    let position = min(lengths[row] - 1u, P.capacity - 1u);
    let head = channel / P.head_dim;
    let at = ((row * P.kv_heads + head) * P.capacity + position) * P.head_dim + channel % P.head_dim;
    k_cache[at] = qkv[row * P.qkv_stride + P.k_offset + channel];
    v_cache[at] = qkv[row * P.qkv_stride + P.v_offset + channel];
}
