// reorder: beams take over their parents' histories without moving a key. `rows[r, j]` names the row of
// the cache that holds position j of beam r; this permutes it and enters the row itself at its position.
//
//   each thread: one position of one source; it reads all of its beams before it writes any
struct Params { sources: u32, capacity: u32, pad_0: u32, pad_1: u32 }
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> parents: array<u32>;               // [R], beam numbers within the source
@group(0) @binding(2) var<storage, read> lengths: array<u32>;               // [R], this token included
@group(0) @binding(3) var<storage, read_write> rows: array<u32>;            // [R, L]
// What each thread has read: an array of its own would be spilled by GPUs.
var<workgroup> wg_old: array<u32, {{ BEAMS * 64 }}>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = (group.y * groups.x + group.x) * 64u + thread;
    if (index >= P.sources * P.capacity) { return; }
    let first = (index / P.capacity) * {{ BEAMS }}u;
    let j = index % P.capacity;
{% for n in range(BEAMS) %}
    wg_old[{{ n * 64 }}u + thread] = rows[(first + {{ n }}u) * P.capacity + j];
{% endfor %}
{% for n in range(BEAMS) %}
    {
        let row = first + {{ n }}u;
        let parent = min(parents[row], {{ BEAMS - 1 }}u);
        rows[row * P.capacity + j] = select(wg_old[parent * 64u + thread], row, j + 1u == lengths[row]);
    }
{% endfor %}
}
