//! An attention problem: every check, no device.

use crate::gpu::{DType, Tensor};
use crate::{Error, Result};

/// A tensor seen as `[batch, heads, rows, columns]`, with the columns next to each other.
#[derive(Clone, Debug)]
pub struct View<'a> {
    pub(crate) tensor: &'a Tensor,
    pub(crate) layout: Layout,
}

/// Where a view's elements lie: extents, offset and strides in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `[batch, heads, rows, columns]`.
    pub extents: [u32; 4],
    /// The first element.
    pub offset: u32,
    /// Steps between batches, heads and rows; columns lie one apart.
    pub strides: [u32; 3],
}

impl Layout {
    /// One past the last element.
    fn end(&self) -> u128 {
        if self.extents.contains(&0) {
            return 0;
        }
        let [b, h, l, d] = self.extents.map(u128::from);
        let [sb, sh, sl] = self.strides.map(u128::from);
        self.offset as u128 + (b - 1) * sb + (h - 1) * sh + (l - 1) * sl + d
    }

    /// Whether no two of its elements are one: each stride steps over all that the lesser ones reach.
    fn disjoint(&self) -> bool {
        let [b, h, l, d] = self.extents.map(u128::from);
        let [sb, sh, sl] = self.strides.map(u128::from);
        let mut axes = [(1, d), (sl, l), (sh, h), (sb, b)];
        axes.sort_unstable();
        let mut reach = 1;
        for (stride, n) in axes.into_iter().filter(|&(_, n)| n > 1) {
            if stride < reach {
                return false;
            }
            reach += stride * (n - 1);
        }
        true
    }

    fn aligned(&self) -> bool {
        let [sb, sh, sl] = self.strides;
        [self.offset, sb, sh, sl, self.extents[3]]
            .iter()
            .all(|n| n % 4 == 0)
    }

    fn packed(&self) -> [u32; 4] {
        [
            self.offset,
            self.strides[0],
            self.strides[1],
            self.strides[2],
        ]
    }
}

impl<'a> View<'a> {
    /// A dense tensor `[B, H, L, D]`.
    pub fn bhld(tensor: &'a Tensor) -> Result<Self> {
        let &[b, h, l, d] = tensor.shape.as_slice() else {
            return Err(Error::refused(
                "a view of [B, H, L, D]",
                format_args!("{:?}", tensor.shape),
                "four extents",
            ));
        };
        let row = l.saturating_mul(d);
        View::new(tensor, [b, h, l, d], 0, [h.saturating_mul(row), row, d])
    }

    /// Heads next to each other in rows of `width` elements, from column `column` on: `[B, L, H, D]`, or
    /// the queries, keys or values of a packed projection.
    pub fn packed(tensor: &'a Tensor, extents: [u32; 4], width: u32, column: u32) -> Result<Self> {
        let [_, _, l, d] = extents;
        View::new(tensor, extents, column, [l.saturating_mul(width), d, width])
    }

    /// Any view; `strides` over batch, head and row, in elements.
    ///
    /// # Errors
    /// [`Error::Refused`] where the view leaves the tensor's elements.
    pub fn new(
        tensor: &'a Tensor,
        extents: [u32; 4],
        offset: u32,
        strides: [u32; 3],
    ) -> Result<Self> {
        let layout = Layout {
            extents,
            offset,
            strides,
        };
        if layout.end() > tensor.len() as u128 || layout.end() > u32::MAX as u128 {
            return Err(Error::refused(
                "a view",
                format_args!("{layout:?}"),
                format!("its tensor has {} elements", tensor.len()),
            ));
        }
        Ok(View { tensor, layout })
    }
}

/// Where query row 0 stands among the keys, for the causal mask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Align {
    /// The last query stands at the last valid key: query i at key position i + kv_len - Q.
    #[default]
    BottomRight,
    /// Query i stands at key position i.
    TopLeft,
}

/// What is computed, the same on every route. The law of scores: scale, then the mask. A row that sees
/// no key gives zeros.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// The scores' factor; 1 / sqrt(D) if not given.
    pub scale: Option<f32>,
    /// Queries see keys up to their own position.
    pub causal: bool,
    /// Where the queries stand, for the causal mask.
    pub align: Align,
    /// The route to take; chosen by the plan if not given.
    pub route: Option<super::Route>,
    /// Parts of the key axis on the `decode` route; chosen by the plan if not given.
    pub splits: Option<u32>,
}

/// The tensors of one attention: `O = softmax(scale Q K^T + mask) V`.
#[derive(Clone, Debug)]
pub struct Tensors<'a> {
    /// Queries. `[B, H, Q, D]`
    pub q: View<'a>,
    /// Keys; Bk divides B, and consecutive batch rows of Q share one of K. `[Bk, Hk, K, D]`
    pub k: View<'a>,
    /// Values. `[Bk, Hk, K, Dv]`
    pub v: View<'a>,
    /// The result. `[B, H, Q, Dv]`
    pub out: View<'a>,
    /// Valid keys of each batch row of K, the first ones; all of them if not given. u32 `[Bk]`
    pub kv_len: Option<&'a Tensor>,
    /// For each batch row and key position, the batch row of K and V that holds it: histories that
    /// share a past (beams). u32 `[Bk, K]`
    pub rows: Option<&'a Tensor>,
    /// Where the weights go; only the three-pass route has them. f32 `[B, H, Q, K]`
    pub weights: Option<&'a Tensor>,
}

/// A checked problem, as plain data.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    pub(crate) q: Layout,
    pub(crate) k: Layout,
    pub(crate) v: Layout,
    pub(crate) out: Layout,
    pub(crate) q_type: DType,
    pub(crate) kv_type: DType,
    pub(crate) out_type: DType,
    pub(crate) has_kv_len: bool,
    pub(crate) has_rows: bool,
    pub(crate) wants_weights: bool,
    pub(crate) scale: f32,
    pub(crate) options: Options,
}

impl Problem {
    /// Checks everything that can be checked without a device.
    ///
    /// # Errors
    /// [`Error::Refused`], naming the argument, its value and the bound.
    pub fn new(tensors: &Tensors, options: &Options) -> Result<Problem> {
        let Tensors { q, k, v, out, .. } = tensors;
        let [b, h, q_len, d] = q.layout.extents;
        let [kv_b, hk, k_len, kd] = k.layout.extents;
        let dv = v.layout.extents[3];
        let refuse = |what: &str, value: &dyn std::fmt::Debug, bound: String| {
            Err(Error::refused(what, format_args!("{value:?}"), bound))
        };
        for (name, extents) in [
            ("q", q.layout.extents),
            ("k", k.layout.extents),
            ("v", v.layout.extents),
        ] {
            if let Some(axis) = [0, 1, 3].into_iter().find(|&axis| extents[axis] == 0) {
                let axis = ["batch", "heads", "", "head dim"][axis];
                return refuse(
                    name,
                    &extents,
                    format!("its {axis} extent must not be zero"),
                );
            }
        }
        if !b.is_multiple_of(kv_b) {
            return refuse("k's batch", &kv_b, format!("it must divide q's batch, {b}"));
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
            return refuse(
                "out",
                &out.layout.extents,
                format!("it must be {:?}", [b, h, q_len, dv]),
            );
        }
        for (name, dtype) in [
            ("q", q.tensor.dtype),
            ("k", k.tensor.dtype),
            ("out", out.tensor.dtype),
        ] {
            if !matches!(dtype, DType::F32 | DType::F16) {
                return refuse(name, &dtype, "f32 or f16".into());
            }
        }
        if v.tensor.dtype != k.tensor.dtype {
            return refuse(
                "v's type",
                &v.tensor.dtype,
                format!("k's is {:?}", k.tensor.dtype),
            );
        }
        let read = [
            ("q", Some(q.tensor)),
            ("k", Some(k.tensor)),
            ("v", Some(v.tensor)),
            ("kv_len", tensors.kv_len),
            ("rows", tensors.rows),
        ];
        let written = [("out", Some(out.tensor)), ("weights", tensors.weights)];
        for (ix, (name, tensor)) in written.iter().enumerate() {
            let Some(tensor) = tensor else { continue };
            for (other, input) in read.iter().chain(&written[..ix]) {
                if input.is_some_and(|input| input.buffer() == tensor.buffer()) {
                    return Err(Error::refused(
                        *name,
                        format_args!("in the buffer of {other}"),
                        "a buffer of its own",
                    ));
                }
            }
        }
        if !out.layout.disjoint() {
            return refuse(
                "out",
                &out.layout.strides,
                "strides over batch, head and row that step over what lies within".into(),
            );
        }
        let scale = options.scale.unwrap_or(1.0 / (d as f32).sqrt());
        if !scale.is_finite() {
            return refuse("scale", &scale, "a finite number".into());
        }
        if options.splits == Some(0) {
            return refuse("splits", &0, "at least 1".into());
        }
        for (name, tensor, shape) in [
            ("kv_len", tensors.kv_len, vec![kv_b]),
            ("rows", tensors.rows, vec![kv_b, k_len]),
        ] {
            let Some(tensor) = tensor else { continue };
            if tensor.shape != shape || tensor.dtype != DType::U32 {
                let is = (tensor.dtype, &tensor.shape);
                return refuse(name, &is, format!("it must be u32 {shape:?}"));
            }
        }
        if let Some(weights) = tensors.weights {
            let shape = [b, h, q_len, k_len];
            if weights.shape != shape || weights.dtype != DType::F32 {
                let is = (weights.dtype, &weights.shape);
                return refuse("weights", &is, format!("they must be f32 {shape:?}"));
            }
        }
        Ok(Problem {
            q: q.layout,
            k: k.layout,
            v: v.layout,
            out: out.layout,
            q_type: q.tensor.dtype,
            kv_type: k.tensor.dtype,
            out_type: out.tensor.dtype,
            has_kv_len: tensors.kv_len.is_some(),
            has_rows: tensors.rows.is_some(),
            wants_weights: tensors.weights.is_some(),
            scale,
            options: options.clone(),
        })
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

    pub(crate) fn params(&self, splits: u32, split_len: u32) -> Params {
        let [batch, heads, q_len, head_dim] = self.q.extents;
        let [kv_batch, kv_heads, k_len, _] = self.k.extents;
        Params {
            sizes: [
                batch,
                heads,
                q_len,
                head_dim,
                kv_batch,
                kv_heads,
                k_len,
                self.v.extents[3],
            ],
            q_at: self.q.packed(),
            k_at: self.k.packed(),
            v_at: self.v.packed(),
            o_at: self.out.packed(),
            scale: self.scale,
            splits,
            split_len,
            rows_stride: k_len,
        }
    }
}

/// The largest head dim of queries, keys and values.
pub const MAX_HEAD_DIM: u32 = 576;

/// `Problem` of shaders/shared/problem.wgsl.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Params {
    sizes: [u32; 8],
    q_at: [u32; 4],
    k_at: [u32; 4],
    v_at: [u32; 4],
    o_at: [u32; 4],
    scale: f32,
    splits: u32,
    split_len: u32,
    rows_stride: u32,
}
