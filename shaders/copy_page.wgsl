// copy_page: one page of a pool over another.
struct Params { words: u32, from_page: u32, to_page: u32, pad: u32 }
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read_write> pool: array<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let word = (group.y * groups.x + group.x) * 64u + thread;
    if (word >= P.words) { return; }
    pool[P.to_page * P.words + word] = pool[P.from_page * P.words + word];
}
