//! An attention problem: every check, no device.

mod functions;
mod options;
mod view;

use std::fmt::Debug;
use std::sync::Arc;

pub use options::{Align, Options, Stage, T5, Tensors};
pub use view::{Layout, View};

use crate::gpu::{DType, Tensor};
use crate::{Error, Result};

/// The largest head dim of queries, keys and values.
pub const MAX_HEAD_DIM: u32 = 576;
/// The longest query and key axes, and the farthest window: positions are counted in 32 bits.
pub const MAX_LEN: u32 = 1 << 29;

/// A checked problem, as plain data.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// B, which ragged sequences count.
    pub(crate) batch: u32,
    pub(crate) q: Layout,
    pub(crate) k: Layout,
    pub(crate) v: Layout,
    pub(crate) out: Layout,
    pub(crate) bias: Option<Layout>,
    pub(crate) mask: Option<Layout>,
    /// Of q, k, v and out.
    pub(crate) types: [DType; 4],
    pub(crate) bias_type: Option<DType>,
    pub(crate) t5_buckets: u32,
    pub(crate) has_kv_len: bool,
    pub(crate) has_q_offset: bool,
    pub(crate) has_prefix: bool,
    pub(crate) ragged_q: bool,
    pub(crate) ragged_k: bool,
    /// Ragged sequences of so many queries, at least and at most, are these launches'; others have their own.
    pub(crate) queries: [u32; 2],
    pub(crate) has_rows: bool,
    /// Pages of each batch row of K, which they are B of; K and V are pools.
    pub(crate) pages: Option<[u32; 2]>,
    pub(crate) has_alibi: bool,
    pub(crate) has_sinks: bool,
    pub(crate) extra: Vec<(Arc<str>, DType)>,
    pub(crate) wants_weights: bool,
    pub(crate) wants_lse: bool,
    pub(crate) scale: f32,
    pub(crate) options: Options,
}

fn refuse<T>(what: &str, value: &dyn Debug, bound: impl Into<String>) -> Result<T> {
    Err(Error::refused(what, format_args!("{value:?}"), bound))
}

impl Problem {
    /// Checks everything that can be checked without a device.
    ///
    /// # Errors
    /// [`Error::Refused`], naming the argument, its value and the bound.
    pub fn new(tensors: &Tensors, options: &Options) -> Result<Problem> {
        let batch = check_shapes(tensors)?;
        check_types(tensors)?;
        check_overlap(tensors)?;
        check_tables(tensors, options, batch)?;
        let scale = check_options(tensors, options)?;
        let Tensors { q, k, v, out, .. } = tensors;
        Ok(Problem {
            batch,
            q: q.layout,
            k: k.layout,
            v: v.layout,
            out: out.layout,
            bias: tensors.bias.as_ref().map(|view| view.layout),
            mask: tensors.mask.as_ref().map(|view| view.layout),
            types: [q, k, v, out].map(|view| view.tensor.dtype),
            bias_type: tensors.bias.as_ref().map(|view| view.tensor.dtype),
            t5_buckets: tensors.t5.map_or(0, |table| table.shape[0]),
            has_kv_len: tensors.kv_len.is_some(),
            has_q_offset: tensors.q_offset.is_some(),
            has_prefix: tensors.prefix_len.is_some(),
            ragged_q: tensors.cu_q.is_some(),
            ragged_k: tensors.cu_k.is_some(),
            queries: [0, u32::MAX],
            has_rows: tensors.rows.is_some(),
            pages: tensors.pages.map(|pages| [pages.shape[0], pages.shape[1]]),
            has_alibi: tensors.alibi.is_some(),
            has_sinks: tensors.sinks.is_some(),
            extra: tensors
                .extra
                .iter()
                .map(|&(name, tensor)| (name.into(), tensor.dtype))
                .collect(),
            wants_weights: tensors.weights.is_some(),
            wants_lse: tensors.lse.is_some(),
            scale,
            options: options.clone(),
        })
    }

    pub(crate) fn heads(&self) -> u32 {
        self.q.extents[1]
    }

    /// The tables of 32-bit words that there are, with the number of their words; where each lies when packed
    /// is a field of `Problem` of shaders/shared/problem.wgsl, in this order.
    pub(crate) fn words_of_tables(&self) -> [(&'static str, u64); 10] {
        let (batch, kv_batch) = (u64::from(self.batch), u64::from(self.kv_batch()));
        let heads = u64::from(self.heads());
        let words = |there: bool, n: u64| if there { n } else { 0 };
        let pages = self
            .pages
            .map_or(0, |[rows, n]| u64::from(rows) * u64::from(n));
        [
            ("cu_q", words(self.ragged_q, batch + 1)),
            ("cu_k", words(self.ragged_k, batch + 1)),
            ("kv_len", words(self.has_kv_len, kv_batch)),
            ("q_offset", words(self.has_q_offset, batch)),
            ("prefix_len", words(self.has_prefix, batch)),
            (
                "rows",
                words(self.has_rows, kv_batch * u64::from(self.k_len())),
            ),
            ("pages", pages),
            ("alibi", words(self.has_alibi, heads)),
            ("t5", u64::from(self.t5_buckets) * heads),
            ("sinks", words(self.has_sinks, heads)),
        ]
    }

    pub(crate) fn kv_heads(&self) -> u32 {
        self.k.extents[1]
    }

    /// Q; of ragged sequences the rows of all together.
    pub(crate) fn q_len(&self) -> u32 {
        self.q.extents[2]
    }

    /// The most queries of a sequence, where a plan is for short ones alone.
    pub(crate) fn few_queries(&self) -> Option<u32> {
        let [_, most] = self.queries;
        Some(most).filter(|&most| self.ragged_q && most < self.q_len())
    }

    pub(crate) fn k_len(&self) -> u32 {
        self.k.extents[2] * self.pages.map_or(1, |[_, pages]| pages)
    }

    pub(crate) fn head_dim(&self) -> u32 {
        self.q.extents[3]
    }

    pub(crate) fn value_dim(&self) -> u32 {
        self.v.extents[3]
    }

    /// Batch rows of K: one a sequence where keys are ragged.
    pub(crate) fn kv_batch(&self) -> u32 {
        match (self.pages, self.ragged_k) {
            (Some([rows, _]), _) => rows,
            (None, true) => self.batch,
            (None, false) => self.k.extents[0],
        }
    }

    /// Keys that a query sees before and after its own position.
    pub(crate) fn window(&self) -> [Option<u32>; 2] {
        let [left, right] = self.options.window;
        match self.options.causal {
            true => [left, Some(0)],
            false => [left, right],
        }
    }

    /// Elements that four-wide loads may take: every offset, stride and row is whole fours.
    pub(crate) fn vec(&self) -> u32 {
        match [self.q, self.k, self.v, self.out]
            .iter()
            .all(Layout::aligned)
        {
            true => 4,
            false => 1,
        }
    }
}

/// Batch rows and length of K, by its table of pages where it has one.
fn keys_of(tensors: &Tensors) -> Result<[u32; 2]> {
    let [kv_b, _, k_len, _] = tensors.k.layout.extents;
    let Some(pages) = tensors.pages else {
        return Ok([kv_b, k_len]);
    };
    if tensors.cu_k.is_some() || tensors.rows.is_some() {
        return refuse("pages", &"given", "not with cu_k or rows");
    }
    let &[rows, n] = pages.shape.as_slice() else {
        return refuse("pages", &pages.shape, "it must be u32 [Bk, M]");
    };
    if rows == 0 || pages.dtype != DType::U32 {
        let is = (pages.dtype, &pages.shape);
        return refuse("pages", &is, "it must be u32 [Bk, M]");
    }
    if k_len == 0 {
        return refuse("k", &tensors.k.layout.extents, "pages of one key at least");
    }
    match k_len.checked_mul(n).filter(|&n| n <= MAX_LEN) {
        Some(k_len) => Ok([rows, k_len]),
        None => refuse("pages", &pages.shape, format!("at most {MAX_LEN} keys")),
    }
}

/// Shapes that agree; the answer is B.
fn check_shapes(tensors: &Tensors) -> Result<u32> {
    let Tensors { q, k, v, out, .. } = tensors;
    let [b, h, q_len, d] = q.layout.extents;
    let [_, hk, _, kd] = k.layout.extents;
    let [kv_b, k_len] = keys_of(tensors)?;
    let dv = v.layout.extents[3];
    for (name, view) in [("q", q), ("k", k), ("v", v)] {
        let extents = view.layout.extents;
        if let Some(axis) = [0, 1, 3].into_iter().find(|&axis| extents[axis] == 0) {
            let axis = ["batch", "heads", "", "head dim"][axis];
            return refuse(
                name,
                &extents,
                format!("its {axis} extent must not be zero"),
            );
        }
        if extents[2] > MAX_LEN {
            return refuse(name, &extents, format!("at most {MAX_LEN} rows"));
        }
    }
    let batch = match tensors.cu_q {
        None => b,
        Some(cu_q) => {
            if b != 1 {
                return refuse("q's batch", &b, "1, as cu_q cuts its rows into sequences");
            }
            (cu_q.len() as u32).max(1) - 1
        }
    };
    let kv_batch = match tensors.cu_k {
        None => kv_b,
        Some(_) if kv_b != 1 => {
            return refuse(
                "k's batch",
                &kv_b,
                "1, as cu_k cuts its rows into sequences",
            );
        }
        Some(cu_k) => (cu_k.len() as u32).max(1) - 1,
    };
    for (name, table, n) in [
        ("cu_q", tensors.cu_q, batch),
        ("cu_k", tensors.cu_k, kv_batch),
    ] {
        if table.is_some() && n == 0 {
            return refuse(name, &table.map(|t| &t.shape), "at least one sequence");
        }
    }
    if !batch.is_multiple_of(kv_batch) || (tensors.cu_k.is_some() && batch != kv_batch) {
        let bound = format!("it must divide q's batch, {batch}, and equal it with cu_k");
        return refuse("k's batch", &kv_batch, bound);
    }
    if !h.is_multiple_of(hk) {
        return refuse("k's heads", &hk, format!("they must divide q's heads, {h}"));
    }
    if kd != d {
        return refuse("k's head dim", &kd, format!("q's is {d}"));
    }
    if d > MAX_HEAD_DIM || dv > MAX_HEAD_DIM {
        return refuse(
            "the head dim",
            &d.max(dv),
            format!("at most {MAX_HEAD_DIM}"),
        );
    }
    if v.layout.extents[..3] != k.layout.extents[..3] {
        return refuse(
            "v",
            &v.layout.extents,
            format!("k is {:?}", k.layout.extents),
        );
    }
    if out.layout.extents != [b, h, q_len, dv] {
        let bound = format!("it must be {:?}", [b, h, q_len, dv]);
        return refuse("out", &out.layout.extents, bound);
    }
    if !out.layout.disjoint() {
        let bound = "strides over batch, head, row and column that step over what lies within";
        return refuse("out", &out.layout.strides, bound);
    }
    for (name, view) in [("bias", &tensors.bias), ("mask", &tensors.mask)] {
        let Some(view) = view else { continue };
        // Ragged sequences have local indices, so a row of the longest there could be.
        let wanted = [batch, h, q_len, k_len];
        if view.layout.extents != wanted {
            return refuse(name, &view.layout.extents, format!("it must be {wanted:?}"));
        }
    }
    Ok(batch)
}

fn check_types(tensors: &Tensors) -> Result<()> {
    let views = [
        ("q", Some(&tensors.q)),
        ("k", Some(&tensors.k)),
        ("v", Some(&tensors.v)),
        ("out", Some(&tensors.out)),
        ("bias", tensors.bias.as_ref()),
    ];
    for (name, view) in views {
        let Some(view) = view else { continue };
        let dtype = view.tensor.dtype;
        let cached = name == "k" || name == "v";
        if !(dtype.is_float() || cached && dtype.is_quantized()) {
            let also = if cached { ", q8_0 or q4_0" } else { "" };
            return refuse(name, &dtype, format!("f32, f16 or bf16{also}"));
        }
    }
    if let Some(mask) = &tensors.mask
        && mask.tensor.dtype != DType::Bool
    {
        return refuse("mask", &mask.tensor.dtype, "bool");
    }
    if tensors.extra.len() > 2 {
        let names: Vec<&str> = tensors.extra.iter().map(|&(name, _)| name).collect();
        return refuse("extra", &names, "at most two buffers");
    }
    for (name, tensor) in &tensors.extra {
        if !matches!(tensor.dtype, DType::F32 | DType::U32 | DType::I32) {
            return refuse(name, &tensor.dtype, "f32, u32 or i32");
        }
    }
    Ok(())
}

/// The tensors that are read, and those that are written.
type Bound<'a> = Vec<(&'a str, Option<&'a Tensor>)>;

fn bound<'a>(tensors: &Tensors<'a>) -> [Bound<'a>; 2] {
    let mut read: Bound = vec![
        ("q", Some(tensors.q.tensor)),
        ("k", Some(tensors.k.tensor)),
        ("v", Some(tensors.v.tensor)),
        ("kv_len", tensors.kv_len),
        ("q_offset", tensors.q_offset),
        ("prefix_len", tensors.prefix_len),
        ("cu_q", tensors.cu_q),
        ("cu_k", tensors.cu_k),
        ("rows", tensors.rows),
        ("pages", tensors.pages),
        ("bias", tensors.bias.as_ref().map(|view| view.tensor)),
        ("mask", tensors.mask.as_ref().map(|view| view.tensor)),
        ("alibi", tensors.alibi),
        ("t5", tensors.t5),
        ("sinks", tensors.sinks),
    ];
    let extra = tensors.extra.iter();
    read.extend(extra.map(|&(name, tensor)| (name, Some(tensor))));
    let written = vec![
        ("out", Some(tensors.out.tensor)),
        ("weights", tensors.weights),
        ("lse", tensors.lse),
    ];
    [read, written]
}

/// An error for a tensor in the buffer of one of the others.
fn check_apart(name: &str, tensor: &Tensor, others: &[(&str, Option<&Tensor>)]) -> Result<()> {
    for (other, input) in others {
        if input.is_some_and(|input| input.buffer() == tensor.buffer()) {
            return Err(Error::refused(
                name,
                format_args!("in the buffer of {other}"),
                "a buffer of its own",
            ));
        }
    }
    Ok(())
}

/// What is written has a buffer of its own: no binding may be both read and written.
fn check_overlap(tensors: &Tensors) -> Result<()> {
    let [read, written] = bound(tensors);
    for (ix, &(name, tensor)) in written.iter().enumerate() {
        let Some(tensor) = tensor else { continue };
        check_apart(name, tensor, &read)?;
        check_apart(name, tensor, &written[..ix])?;
    }
    Ok(())
}

/// Lent scratch is written, too.
pub(super) fn check_scratch(tensors: &Tensors, scratch: &Tensor) -> Result<()> {
    let [read, written] = bound(tensors);
    check_apart("scratch", scratch, &read)?;
    check_apart("scratch", scratch, &written)
}

fn check_tables(tensors: &Tensors, options: &Options, batch: u32) -> Result<()> {
    let [q_batch, h, q_len, _] = tensors.q.layout.extents;
    let [kv_b, k_len] = keys_of(tensors)?;
    if tensors.cu_k.is_some() && (tensors.kv_len.is_some() || tensors.rows.is_some()) {
        return refuse(
            "kv_len or rows",
            &"given",
            "not with cu_k, which has the lengths",
        );
    }
    use DType::{F32, I32, U32};
    for (name, tensor, dtype, shape) in [
        ("kv_len", tensors.kv_len, U32, vec![kv_b]),
        ("q_offset", tensors.q_offset, I32, vec![batch]),
        ("prefix_len", tensors.prefix_len, U32, vec![batch]),
        ("cu_q", tensors.cu_q, U32, vec![batch + 1]),
        ("cu_k", tensors.cu_k, U32, vec![batch + 1]),
        ("rows", tensors.rows, U32, vec![kv_b, k_len]),
        ("alibi", tensors.alibi, F32, vec![h]),
        ("sinks", tensors.sinks, F32, vec![h]),
        (
            "weights",
            tensors.weights,
            F32,
            vec![q_batch, h, q_len, k_len],
        ),
        ("lse", tensors.lse, F32, vec![q_batch, h, q_len]),
    ] {
        let Some(tensor) = tensor else { continue };
        if tensor.shape != shape || tensor.dtype != dtype {
            let is = (tensor.dtype, &tensor.shape);
            return refuse(name, &is, format!("it must be {} {shape:?}", dtype.name()));
        }
    }
    match (tensors.t5, options.t5) {
        (None, None) => {}
        (Some(table), Some(t5)) => {
            let fits = table.dtype == F32 && table.shape.len() == 2 && table.shape[1] == h;
            let least = if t5.bidirectional { 4 } else { 2 };
            if !fits || table.shape[0] < least || table.shape[0] % least != 0 {
                let is = (table.dtype, &table.shape);
                let bound = format!("it must be f32 [buckets, {h}], a multiple of {least} buckets");
                return refuse("t5", &is, bound);
            }
            let exact = table.shape[0] / least;
            if t5.max_distance <= exact {
                let bound = format!("more than the {exact} buckets of one distance each");
                return refuse("t5's max_distance", &t5.max_distance, bound);
            }
        }
        (table, t5) => {
            let is = (table.map(|table| &table.shape), t5);
            return refuse("t5", &is, "the table and the option go together");
        }
    }
    Ok(())
}

/// The scale, if all is well.
fn check_options(tensors: &Tensors, options: &Options) -> Result<f32> {
    let d = tensors.q.layout.extents[3];
    let scale = options.scale.unwrap_or(1.0 / (d as f32).sqrt());
    if !scale.is_finite() {
        return refuse("scale", &scale, "a finite number");
    }
    if let Some(cap) = options.softcap
        && !(cap.is_finite() && cap > 0.0)
    {
        return refuse("softcap", &cap, "a finite number above zero");
    }
    for bound in options.window.into_iter().flatten() {
        if bound > MAX_LEN {
            return refuse("window", &options.window, format!("at most {MAX_LEN} keys"));
        }
    }
    if options.causal && options.window[1].is_some_and(|right| right > 0) {
        let bound = "no keys to the right: causal is asked for";
        return refuse("window", &options.window, bound);
    }
    if options.f16_math {
        for (name, view) in [("q", &tensors.q), ("k", &tensors.k), ("v", &tensors.v)] {
            if view.tensor.dtype != DType::F16 {
                let is = view.tensor.dtype.name();
                return refuse(
                    "f16_math",
                    &true,
                    format!("not with {name} in {is}: it takes f16"),
                );
            }
        }
    }
    if options.splits == Some(0) {
        return refuse("splits", &0, "at least 1");
    }
    if options.stage != Stage::Softmax && tensors.weights.is_none() {
        return refuse(
            "stage",
            &options.stage,
            "nothing without the weights tensor",
        );
    }
    functions::check(tensors, options)?;
    Ok(scale)
}

/// `Problem` of shaders/shared/problem.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    pub sizes: [u32; 8],
    pub q_at: [u32; 4],
    pub k_at: [u32; 4],
    pub v_at: [u32; 4],
    pub o_at: [u32; 4],
    pub columns: [u32; 4],
    pub bias_at: [u32; 4],
    pub mask_at: [u32; 4],
    pub bias_from: u32,
    pub mask_from: u32,
    pub weights_from: u32,
    pub lse_from: u32,
    pub scale: f32,
    pub softcap: f32,
    pub minus_infinity: f32,
    pub left: u32,
    pub right: u32,
    pub splits: u32,
    pub split_len: u32,
    pub t5_buckets: u32,
    pub t5_distance: f32,
    pub b_from: u32,
    pub kv_from: u32,
    pub kv_count: u32,
    pub blocks: u32,
    pub block_from: u32,
    pub count: u32,
    pub k_blocks: u32,
    pub one: u32,
    pub pool: u32,
    pub queries: [u32; 2],
    pub tables_from: [u32; 10],
    pub pad: [u32; 2],
}

impl Problem {
    /// The parameters that are the same for every launch.
    pub(crate) fn params(&self, splits: u32, split_len: u32) -> Params {
        let at = |layout: &Layout| {
            let [sb, sh, sl, _] = layout.strides;
            [layout.offset, sb, sh, sl]
        };
        let strides = |layout: &Option<Layout>| layout.map_or([0; 4], |layout| layout.strides);
        let from = |layout: &Option<Layout>| layout.map_or(0, |layout| layout.offset);
        let [left, right] = self.window();
        let buckets = match self.options.t5 {
            Some(t5) if t5.bidirectional => self.t5_buckets / 2,
            _ => self.t5_buckets,
        };
        let exact = (buckets / 2).max(1);
        Params {
            sizes: [
                self.batch,
                self.heads(),
                self.q_len(),
                self.head_dim(),
                self.kv_batch(),
                self.kv_heads(),
                self.k_len(),
                self.value_dim(),
            ],
            q_at: at(&self.q),
            k_at: at(&self.k),
            v_at: at(&self.v),
            o_at: at(&self.out),
            columns: [self.q, self.k, self.v, self.out].map(|layout| layout.strides[3]),
            bias_at: strides(&self.bias),
            mask_at: strides(&self.mask),
            bias_from: from(&self.bias),
            mask_from: from(&self.mask),
            scale: self.scale,
            softcap: self.options.softcap.unwrap_or(1.0),
            minus_infinity: f32::NEG_INFINITY,
            one: 1,
            pool: self.k.extents[0],
            left: left.unwrap_or(0),
            right: right.unwrap_or(0),
            splits,
            split_len,
            queries: self.queries,
            t5_buckets: self.t5_buckets,
            t5_distance: self
                .options
                .t5
                .map_or(1.0, |t5| (t5.max_distance as f32 / exact as f32).ln()),
            ..Params::default()
        }
    }
}
