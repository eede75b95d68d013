//! What a step adds to the cache, and its queries made ready.

use super::{apart, extents, holds, is_kept};
use crate::gpu::blocks::BLOCK;
use crate::gpu::{DType, Recorder, Shader, Tensor};
use crate::{Error, Result};

/// Rotary positions (Su et al. 2021): pairs of a head's columns turn with the position.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// Turns a position of each pair, in units of 2^-32, then what is left of that in units of 2^-44; whole
    /// turns do not count. u32 `[pairs, 2]`
    pub turns: Tensor,
    /// Which columns make a pair.
    pub pairs: Pairs,
    /// The factor of the columns that turn.
    pub attention_factor: f32,
}

/// Which columns of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// Column i and column i + rotary / 2.
    Halves,
    /// Columns 2 i and 2 i + 1.
    Neighbours,
}

/// RMSNorm of every head of queries and keys (Henry et al. 2020), before they turn.
#[derive(Clone, Debug)]
pub struct QkNorm {
    /// The queries' scale, then the keys'. f32 `[2, D]`
    pub gamma: Tensor,
    /// Added to the mean square.
    pub eps: f32,
}

/// Where the rows of a step belong.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// Row r is the token of sequence r at position `lengths[r] - 1`. u32 `[R]`
    Lengths(&'a Tensor),
    /// The sequence and the position of each row; [`NOWHERE`] for a row of padding. u32 `[R, 2]`
    Places(&'a Tensor),
}

/// The position of a row that no cache takes.
pub const NOWHERE: u32 = u32::MAX;

/// A head lies in workgroup memory.
const MAX_HEAD_DIM: u32 = 1024;

/// What [`append`] reads and writes.
#[derive(Clone, Copy)]
pub struct Append<'a> {
    /// Queries, keys and values side by side. `[R, (H + 2 Hk) D]`
    pub qkv: &'a Tensor,
    /// Query heads, H.
    pub heads: u32,
    /// Where the rows belong.
    pub rows: Rows<'a>,
    /// Keys. `[S, Hk, L, D]`; with `pages` a pool `[N, Hk, page, D]`
    pub k_cache: &'a Tensor,
    /// Values. `[S, Hk, L, D]`, or `[N, Hk, page, D]`
    pub v_cache: &'a Tensor,
    /// The page that holds each stretch of a sequence; one that is not in the pool takes nothing. u32 `[S, M]`
    pub pages: Option<&'a Tensor>,
    /// Of queries and keys.
    pub qk_norm: Option<&'a QkNorm>,
    /// Of queries and keys.
    pub rotary: Option<&'a Rotary>,
    /// The queries, normed and turned, where either is asked for. `[R, H D]`
    pub q: Option<&'a Tensor>,
}

/// Writes a step's keys and values to their places in the cache, each in the cache's own type, f32, f16,
/// bf16 (of even D), q8_0 or q4_0 (of whole blocks of 32), and the queries beside. Rows without a place, or past the cache's end, write none.
///
/// # Errors
/// [`Error::Refused`] for tensors that do not hold what is said of them, and for what is written in another's buffer.
pub fn append(recorder: &mut Recorder, step: &Append) -> Result<()> {
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct Params {
        rows: u32,
        heads: u32,
        kv_heads: u32,
        first: u32,
        sequences: u32,
        capacity: u32,
        rotary: u32,
        attention_factor: f32,
        eps: f32,
        pool: u32,
        pad: [u32; 2],
    }
    let Append { qkv, heads, .. } = *step;
    is_kept(recorder, "a step's queries, keys and values", qkv.dtype)?;
    let &[blocks, kv_heads, block_len, head_dim] = step.k_cache.shape.as_slice() else {
        let shape = format!("{:?}", step.k_cache.shape);
        return Err(Error::refused("a cache", shape, "four extents"));
    };
    let [sequences, capacity] = match step.pages.map(|pages| pages.shape.as_slice()) {
        None => [blocks, block_len],
        Some(&[sequences, n]) if block_len > 0 && block_len.checked_mul(n).is_some() => {
            [sequences, block_len * n]
        }
        Some(shape) => {
            let bound = format!("[S, M] of pages of {block_len}, at most 2^32 positions");
            return Err(Error::refused("pages", format_args!("{shape:?}"), bound));
        }
    };
    let all = heads as u64 + 2 * kv_heads as u64;
    if all * head_dim as u64 == 0 || head_dim > MAX_HEAD_DIM {
        let shape = format!("{heads} query heads beside {:?}", step.k_cache.shape);
        let bound = format!("heads of 1 to {MAX_HEAD_DIM} columns");
        return Err(Error::refused("a cache", shape, bound));
    }
    let rows = super::check_u32(
        "a step's queries, keys and values",
        qkv.len() / (all * head_dim as u64),
    )?;
    super::check_u32("a step's queries, keys and values", qkv.len())?;
    super::check_u32("a cache", step.k_cache.len())?;
    let caches = [
        ("the keys' cache", step.k_cache),
        ("the values' cache", step.v_cache),
    ];
    for (what, cache) in caches {
        holds(what, cache, cache.dtype, step.k_cache.len())?;
        if cache.dtype == DType::F16 {
            is_kept(recorder, what, cache.dtype)?;
        }
        let fits = match cache.dtype {
            DType::F32 | DType::F16 => true,
            DType::BF16 => head_dim.is_multiple_of(2),
            DType::Q8_0 | DType::Q4_0 => {
                head_dim.is_multiple_of(BLOCK as u32) && cache.shape.last() == Some(&head_dim)
            }
            _ => false,
        };
        if !fits {
            let is = format!(
                "{:?} {:?} with heads of {head_dim}",
                cache.dtype, cache.shape
            );
            let bound =
                "f32, f16, bf16 of even heads, or q8_0 or q4_0 of heads of whole blocks of 32";
            return Err(Error::refused(what, is, bound));
        }
    }
    let places = match step.rows {
        Rows::Lengths(lengths) => {
            holds("lengths", lengths, DType::U32, rows as u64)?;
            lengths
        }
        Rows::Places(places) => {
            holds("places", places, DType::U32, 2 * rows as u64)?;
            places
        }
    };
    let mut bindings = vec![qkv, places, step.k_cache, step.v_cache];
    let makes_queries = step.qk_norm.is_some() || step.rotary.is_some();
    match step.q {
        Some(q) if makes_queries => {
            let elements = rows as u64 * heads as u64 * head_dim as u64;
            holds("a step's queries", q, qkv.dtype, elements)?;
            bindings.push(q);
        }
        None if !makes_queries => {}
        given => {
            let bound = "given where there is a norm or turning, and only there";
            return Err(Error::refused(
                "a step's queries",
                format_args!("{:?}", given.map(|q| &q.shape)),
                bound,
            ));
        }
    }
    let mut rotary = 0;
    if let Some(turning) = step.rotary {
        let [pairs, _] = extents("turns", &turning.turns)?;
        rotary = pairs.saturating_mul(2);
        if rotary > head_dim {
            let bound = format!("2 to the head's {head_dim}");
            return Err(Error::refused("rotary columns", rotary, bound));
        }
        holds("turns", &turning.turns, DType::U32, rotary as u64)?;
        bindings.push(&turning.turns);
    }
    if let Some(norm) = step.qk_norm {
        let what = "the norm of queries and keys";
        holds(what, &norm.gamma, DType::F32, 2 * head_dim as u64)?;
        bindings.push(&norm.gamma);
    }
    if let Some(pages) = step.pages {
        holds("pages", pages, DType::U32, pages.len())?;
        bindings.push(pages);
    }
    let (read, after) = (&bindings[..2], &bindings[4 + usize::from(makes_queries)..]);
    let written = caches.into_iter();
    let written = written.chain(step.q.map(|q| ("a step's queries", q)));
    apart(&written.collect::<Vec<_>>(), &[read, after].concat())?;
    let types = [qkv, step.k_cache, step.v_cache].map(|tensor| tensor.dtype);
    let shader = Shader::new("append")
        .with("F16", types.contains(&DType::F16))
        .with("T", types[0].name())
        .with("K_TYPE", types[1].name())
        .with("V_TYPE", types[2].name())
        .with("HAS_PLACES", matches!(step.rows, Rows::Places(_)))
        .with("QK_NORM", step.qk_norm.is_some())
        .with(
            "ROTARY",
            match step.rotary.map(|turning| turning.pairs) {
                None => "none",
                Some(Pairs::Halves) => "halves",
                Some(Pairs::Neighbours) => "neighbours",
            },
        )
        .with("PAGE", if step.pages.is_some() { block_len } else { 0 })
        .with("HEAD_DIM", head_dim);
    let first = if makes_queries { 0 } else { heads };
    let params = Params {
        rows,
        heads,
        kv_heads,
        first,
        sequences,
        capacity,
        rotary,
        attention_factor: step.rotary.map_or(1.0, |turning| turning.attention_factor),
        eps: step.qk_norm.map_or(0.0, |norm| norm.eps),
        pool: blocks,
        pad: [0; 2],
    };
    let groups = rows as u64 * (all - first as u64);
    recorder.dispatch(&shader, params, &bindings, groups)
}
