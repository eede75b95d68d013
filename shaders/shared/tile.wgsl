// What the workgroup of a prefill kernel has before it: `block`, of `size` rows of one KV head of a batch row.
{% macro tile_of(size) %}
    let b = block.x;
    let row_from = block.y;
    let kh = P.kv_from + index / (v_blocks * P.blocks);
    let kb = kv_row(b);
    let queries = q_count(b);
    let rows = queries * per_kv;
    let length = kv_length(kb);
    let start = q_position(b, length);

    // The keys that any row of the block sees: its queries run from i_low to i_high.
    let row_last = min(row_from + {{ size }}, rows) - 1u;
    let one_head = row_from / queries == row_last / queries;
    let i_low = select(0u, row_from % queries, one_head);
    let i_high = select(queries - 1u, row_last % queries, one_head);
    let low = keys_of(b, start + i32(i_low), length);
    let high = keys_of(b, start + i32(i_high), length);
    let k_last = last_key(high);
{% endmacro %}
