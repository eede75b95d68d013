// limits: what a device does at most, to hold kernels against: multiply-adds from registers, memory read once,
// memory copied.
{% if F16 %}
enable f16;
{% endif %}
// n: vec4s of x, a multiple of 8 threads; turns: of the loop of multiply-adds.
struct Params { n: u32, turns: u32, threads: u32, pad: u32 }
@group(0) @binding(0) var<uniform> P: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ T }}>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<{{ T }}>>;     // [N] copied to, else [threads]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    // There are as many threads as are wanted: after an early return, a processor would mask every operation.
    let id = group.x * 64u + thread;
{% if WORK == "multiply_adds" %}
    // One number each, so that they take one register each.
    let a = vec4<{{ T }}>(x[id].x);
    let b = vec4<{{ T }}>(x[P.threads + id].x);
    {% for n in range(4) %}
    var c{{ n }} = a + vec4<{{ T }}>({{ n }}.0);
    {% endfor %}
    for (var turn = 0u; turn < P.turns; turn += 1u) {
        {% for n in range(4) %}
        c{{ n }} = fma(c{{ n }}, a, b);
        {% endfor %}
    }
    y[id] = (c0 + c1) + (c2 + c3);
{% elif WORK == "read" %}
    {% for n in range(8) %}
    var s{{ n }} = vec4<{{ T }}>();
    {% endfor %}
    for (var begin = 0u; begin < P.n; begin += 8u * P.threads) {
        let at = begin + id;
        {% for n in range(8) %}
        s{{ n }} += x[at + {{ n }}u * P.threads];
        {% endfor %}
    }
    y[id] = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7));
{% else %}
    for (var begin = 0u; begin < P.n; begin += 8u * P.threads) {
        let at = begin + id;
        {% for n in range(8) %}
        y[at + {{ n }}u * P.threads] = x[at + {{ n }}u * P.threads];
        {% endfor %}
    }
{% endif %}
}
