// The attention problem: sizes, strides, tensors, and where each row lies. Before the include a kernel sets
// `buffers`, a list of [name, access, element type]; they are bound in that order behind the parameters,
// then come the optional tables, masks and biases that TABLES names, then those of the caller's functions.
// The tables that PACKED names lie in one buffer behind them, `tables`, where `pack` has put them.

struct Problem {
    batch: u32, heads: u32, q_len: u32, head_dim: u32,
    kv_batch: u32, kv_heads: u32, k_len: u32, value_dim: u32,
    // A view's offset, then its strides over batch, head and row, in elements.
    q_at: vec4<u32>,     // [B, H, Q, D]; [1, H, T, D] where sequences are ragged
    k_at: vec4<u32>,     // [Bk, Hk, K, D]
    v_at: vec4<u32>,     // [Bk, Hk, K, Dv]
    o_at: vec4<u32>,     // [B, H, Q, Dv]
    columns: vec4<u32>,  // steps between columns of Q, K, V and O
    bias_at: vec4<u32>,  // steps over batch, head, query and key
    mask_at: vec4<u32>,
    bias_from: u32, mask_from: u32, weights_from: u32, lse_from: u32,
    scale: f32,          // of Q K^T
    softcap: f32,
    minus_infinity: f32, // which no literal can give
    left: u32,           // keys a query sees before its own position
    right: u32,          // and after it
    splits: u32,         // parts of the key axis
    split_len: u32,      // keys in each part
    t5_buckets: u32,
    t5_distance: f32,    // log of the distance that the last bucket starts at over the first that is shared
    // This launch's share of the problem.
    b_from: u32, kv_from: u32, kv_count: u32,
    blocks: u32,         // of query rows, over the batch rows of this launch
    block_from: u32,     // the first workgroup's number
    count: u32,          // of workgroups, or of threads where they are numbered through
    k_blocks: u32,       // of the block map
    one: u32,            // 1, which no compiler knows
    pool: u32,           // pages of K and V
    least_queries: u32, most_queries: u32, // of the ragged sequences that this launch is for
    // The first word of each packed table.
    cu_q_from: u32, cu_k_from: u32, kv_len_from: u32, q_offset_from: u32, prefix_len_from: u32,
    rows_from: u32, pages_from: u32, alibi_from: u32, t5_from: u32, sinks_from: u32,
}

@group(0) @binding(0) var<uniform> P: Problem;
{# The packed tables lie in scratch, and no buffer may be bound both to read alone and to write. #}
{% set packed = namespace(access="read") %}
{% for name, access, element in buffers if name in ["weights", "parts", "block_map"] and access == "read_write" %}
{% set packed.access = access %}
{% endfor %}
{% for name, access, element in buffers + TABLES + ([["tables", packed.access, "u32"]] if PACKED else []) %}
@group(0) @binding({{ loop.index }}) var<storage, {{ access }}> {{ name }}: array<{{ element }}>;
{% endfor %}

{# An element of a table, wherever it lies. #}
{% macro table(name, index) -%}
{%- for packed, access, element in PACKED if packed == name -%}
bitcast<{{ element }}>(tables[P.{{ name }}_from + {{ index }}])
{%- else -%}
{{ name }}[{{ index }}]
{%- endfor -%}
{%- endmacro %}

{# Drivers unroll loops of known length. That pays on a GPU; a processor gains nothing and compiles for
   seconds, so there the length is not known. #}
{% set ROLL = " * P.one" if SOFTWARE else "" %}
const LOG2_E = 1.4426950408889634;
const LN_2 = 0.6931471805599453;
// Stands for a score that is masked or not there yet: finite, so that no infinity enters the arithmetic.
const NEVER = -1.0e30;

// The number of this workgroup in a grid that is folded over two dimensions.
fn workgroup_index(id: vec3<u32>, count: vec3<u32>) -> u32 {
    return id.y * count.x + id.x;
}

// The batch row of K and V that query batch row `b` attends to: several may share one.
fn kv_row(b: u32) -> u32 {
    return b / (P.batch / P.kv_batch);
}

// The first query row of batch row `b`, and how many there are.
fn q_start(b: u32) -> u32 {
{% if RAGGED_Q %}
    return min({{ table("cu_q", "b") }}, P.q_len);
{% else %}
    return 0u;
{% endif %}
}
fn q_count(b: u32) -> u32 {
{% if RAGGED_Q %}
    return clamp({{ table("cu_q", "b + 1u") }}, q_start(b), P.q_len) - q_start(b);
{% else %}
    return P.q_len;
{% endif %}
}

{% if RAGGED_Q %}
// Whether a sequence of so many queries is this launch's: long ones and short ones may go to kernels of their own.
fn is_own(queries: u32) -> bool {
    return queries >= P.least_queries && queries <= P.most_queries;
}
{% endif %}

// The first key of batch row `kb` of K, and how many there are.
fn k_start(kb: u32) -> u32 {
{% if RAGGED_K %}
    return min({{ table("cu_k", "kb") }}, P.k_len);
{% else %}
    return 0u;
{% endif %}
}
fn kv_length(kb: u32) -> u32 {
{% if RAGGED_K %}
    return clamp({{ table("cu_k", "kb + 1u") }}, k_start(kb), P.k_len) - k_start(kb);
{% elif HAS_KV_LEN %}
    return min({{ table("kv_len", "kb") }}, P.k_len);
{% else %}
    return P.k_len;
{% endif %}
}

// The first element of query `i` of head `h` in a view of Q or O.
fn query_at(view: vec4<u32>, b: u32, h: u32, i: u32) -> u32 {
{% if RAGGED_Q %}
    return view.x + h * view.z + (q_start(b) + i) * view.w;
{% else %}
    return view.x + b * view.y + h * view.z + i * view.w;
{% endif %}
}

// The number of that row where rows lie dense: in scratch, weights and LSE.
fn row_number(b: u32, h: u32, i: u32) -> u32 {
{% if RAGGED_Q %}
    return h * P.q_len + q_start(b) + i;
{% else %}
    return (b * P.heads + h) * P.q_len + i;
{% endif %}
}

// The number of that row's parts in scratch, which short sequences have places of their own for.
fn part_number(b: u32, h: u32, i: u32) -> u32 {
{% if RAGGED_Q %}
    if (P.most_queries < P.q_len) { return (h * P.batch + b) * P.most_queries + i; }
{% endif %}
    return row_number(b, h, i);
}

// Where key `j` of batch row `kb` lies in K and V, batch row and row: `rows` names the batch row that holds each
// position, `pages` the page that holds each PAGE of them.
fn place_of(kb: u32, j: u32) -> vec2<u32> {
{% if RAGGED_K %}
    return vec2<u32>(0u, k_start(kb) + j);
{% elif PAGE %}
    return vec2<u32>(min({{ table("pages", "kb * (P.k_len / " ~ PAGE ~ "u) + j / " ~ PAGE ~ "u") }}, P.pool - 1u), j % {{ PAGE }}u);
{% elif HAS_ROWS %}
    return vec2<u32>(min({{ table("rows", "kb * P.k_len + j") }}, P.kv_batch - 1u), j);
{% else %}
    return vec2<u32>(kb, j);
{% endif %}
}
{# Whether a table has to be read for that. #}
{% set TABLED = PAGE or HAS_ROWS %}

// The first element of what lies there in a view of K or V.
fn place_at(view: vec4<u32>, place: vec2<u32>, head: u32) -> u32 {
    return view.x + place.x * view.y + head * view.z + place.y * view.w;
}
fn key_at(view: vec4<u32>, kb: u32, head: u32, j: u32) -> u32 {
    return place_at(view, place_of(kb, j), head);
}

// Block `n` of this launch, of `size` of the `per_query` rows that each query has: its batch row (past the
// last where there is no such block) and its first row there. Blocks do not straddle batch rows.
fn block_at(n: u32, size: u32, per_query: u32) -> vec2<u32> {
{% if RAGGED_Q %}
    var ahead = n;
    for (var b = 0u; b < P.batch; b += 1u) {
        let blocks = select(0u, (q_count(b) * per_query + size - 1u) / size, is_own(q_count(b)));
        if (ahead < blocks) { return vec2<u32>(b, ahead * size); }
        ahead -= blocks;
    }
    return vec2<u32>(P.batch, 0u);
{% else %}
    let blocks = (P.q_len * per_query + size - 1u) / size;
    return vec2<u32>(P.b_from + n / blocks, (n % blocks) * size);
{% endif %}
}

// Row `n` of this launch where all rows are numbered through: its batch row (past the last where no
// sequence holds the row), head and query.
fn row_at(n: u32) -> vec3<u32> {
    let per_kv = P.heads / P.kv_heads;
{% if RAGGED_Q %}
    if (P.most_queries < P.q_len) {
        let b = n / P.most_queries % P.batch;
        let i = n % P.most_queries;
        let is_row = i < q_count(b) && is_own(q_count(b));
        return vec3<u32>(select(P.batch, b, is_row), P.kv_from * per_kv + n / (P.most_queries * P.batch), i);
    }
{% endif %}
    let h = P.kv_from * per_kv + n / P.q_len % (P.kv_count * per_kv);
    let t = n % P.q_len;
{% if RAGGED_Q %}
    for (var b = 0u; b < P.batch; b += 1u) {
        if (t >= q_start(b) && t < q_start(b) + q_count(b)) { return vec3<u32>(b, h, t - q_start(b)); }
    }
    return vec3<u32>(P.batch, h, 0u);
{% else %}
    return vec3<u32>(P.b_from + n / (P.q_len * P.kv_count * per_kv), h, t);
{% endif %}
}
