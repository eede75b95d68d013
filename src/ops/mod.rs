//! What the stacks need around attention, each a launch or two: matrix products, norms, embedding, the
//! cache's append and reorder, and the choice of the next token.

mod append;
mod matrix;
mod sample;

pub use append::{Append, NOWHERE, Pairs, QkNorm, Rotary, Rows, append};
pub use matrix::{Matrix, Storage};
pub use sample::{Draw, Sampling, sample};

use crate::gpu::{Caps, DType, Recorder, Shader, Tensor};
use crate::{Error, Result};

/// The activation of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x Phi(x), by the error function.
    Gelu,
    /// GELU by its tanh approximation.
    GeluTanh,
    /// x sigmoid(x), also called swish.
    Silu,
}

impl Activation {
    fn wgsl(self) -> &'static str {
        match self {
            Activation::Relu => "relu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_tanh",
            Activation::Silu => "silu",
        }
    }
}

/// Threads of the kernels whose threads are numbered through.
const THREADS: u64 = 64;

fn check_u32(what: &str, elements: u64) -> Result<u32> {
    u32::try_from(elements).map_err(|_| {
        Error::refused(
            what,
            format_args!("{elements} elements"),
            "at most 2^32 - 1",
        )
    })
}

/// An error for a tensor that does not hold what a kernel will read or write of it.
fn holds(what: &str, tensor: &Tensor, dtype: DType, elements: u64) -> Result<()> {
    if tensor.dtype == dtype && tensor.len() >= elements {
        return Ok(());
    }
    let is = format!("{:?} {:?}", tensor.dtype, tensor.shape);
    Err(Error::refused(
        what,
        is,
        format!("{dtype:?}, {elements} elements"),
    ))
}

/// An error for a type of activations that no kernel has, or that the device's shaders have not.
fn is_kept(recorder: &Recorder, what: &str, dtype: DType) -> Result<()> {
    let bound = match dtype {
        DType::F32 => return Ok(()),
        DType::F16 if recorder.gpu().caps().f16 => return Ok(()),
        DType::F16 => "f32: this device has no f16 in shaders",
        _ => "f32 or f16",
    };
    let what = format!("the type of {what}");
    Err(Error::refused(what, dtype.name(), bound))
}

/// The extents of a tensor of so many, none of them 0.
fn extents<const N: usize>(what: &str, tensor: &Tensor) -> Result<[u32; N]> {
    match <[u32; N]>::try_from(tensor.shape.as_slice()) {
        Ok(extents) if !extents.contains(&0) => Ok(extents),
        _ => {
            let bound = format!("{N} extents, none of them 0");
            let shape = format_args!("{:?}", tensor.shape);
            Err(Error::refused(format!("the shape of {what}"), shape, bound))
        }
    }
}

/// An error for what is written in the buffer of another tensor: no binding may be both read and written.
fn apart(written: &[(&str, &Tensor)], read: &[&Tensor]) -> Result<()> {
    for (ix, (what, tensor)) in written.iter().enumerate() {
        let before = written[..ix].iter().map(|(_, other)| other);
        let mut others = read.iter().chain(before);
        if others.any(|other| other.buffer() == tensor.buffer()) {
            let bound = "a buffer of its own";
            return Err(Error::refused(*what, "in another's buffer", bound));
        }
    }
    Ok(())
}

/// A dense layer's weights, `Y = X W + bias`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// W `[K, N]`
    pub weight: Matrix,
    /// f32 `[N rounded up to 4]`
    pub bias: Option<Tensor>,
    /// Outputs.
    pub n: u32,
}

/// Around a matrix product: what follows it in the same launch.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// Applied to X W + bias.
    pub activation: Option<Activation>,
    /// W's columns come in pairs, a gate and what it lets through (Shazeer 2020): the result is
    /// activate(gate) times the other, `[M, N / 2]`.
    pub gated: bool,
    /// Added last. As many elements as the result, of X's type
    pub residual: Option<&'a Tensor>,
    /// Not on cooperative matrices, which many rows alone go to: the bits of a row do not change with how many
    /// others there are.
    pub batch_invariant: bool,
}

/// How many rows make `matmul_coop` the better kernel, where there are matrices: half of a workgroup's.
const MATRIX_ROWS: u32 = 32;

/// How a product's sums are shared out. What decides the order of a sum, the slices and who reads X, knows
/// nothing of the number of rows: a row's bits are the same beside any others.
struct Tile {
    /// Of a thread.
    rows: u32,
    /// Of K.
    slices: u32,
    /// A workgroup's threads share the slices; else rows, and each goes through all slices.
    split: bool,
    /// Lanes pass elements of X on.
    by_lanes: bool,
}

/// Whether lanes pass elements of X on by subgroup operations.
pub(crate) fn passes_lanes(caps: &Caps) -> bool {
    caps.software && caps.subgroups.is_some_and(|(least, _)| least >= 8)
}

impl Tile {
    /// Rows from which on there are threads enough without those of slices.
    const MANY_ROWS: u32 = 64;

    fn new(m: u32, caps: &Caps) -> Tile {
        let by_lanes = passes_lanes(caps);
        let split = caps.software || m < Tile::MANY_ROWS;
        // 8 rows leave too few registers on a processor without lanes that pass on, and on GPUs but those with
        // subgroups of 32: Intel's spill, GCN's hide no latency.
        let of_32 = caps.subgroups.is_some_and(|(least, _)| least == 32);
        let most = if by_lanes || (!split && of_32) { 8 } else { 4 };
        Tile {
            rows: m.next_power_of_two().min(most),
            slices: if caps.software { 1 } else { 8 },
            split,
            by_lanes,
        }
    }
}

/// Y = activate(X W + bias) + residual. X: `[M, K]`, Y: `[M, N]`, or `[M, N / 2]` where gated. Sums are in
/// f32, and the bits of a row do not change with how many others there are; but where X and Y are f16, many rows go to
/// cooperative matrices, if the device has them, for which weights in blocks are rounded to f16.
///
/// # Errors
/// [`Error::Refused`] for tensors that do not hold what is said of them, and for a result in another's buffer.
pub fn matmul(
    recorder: &mut Recorder,
    x: &Tensor,
    linear: &Linear,
    y: &Tensor,
    epilogue: Epilogue,
) -> Result<()> {
    let (k, stride) = (linear.weight.k(), linear.weight.stride());
    is_kept(recorder, "the rows of a matrix product", x.dtype)?;
    is_kept(recorder, "a matrix product's result", y.dtype)?;
    linear.weight.is_kept(recorder)?;
    let m = check_u32("a matrix product's rows", x.len() / k as u64)?;
    check_u32("a matrix product's result", m as u64 * linear.n as u64)?;
    if epilogue.gated && !linear.n.is_multiple_of(2) {
        return Err(Error::refused(
            "a gated matrix's columns",
            linear.n,
            "pairs",
        ));
    }
    let results = m as u64 * linear.n as u64 / if epilogue.gated { 2 } else { 1 };
    holds(
        "the rows of a matrix product",
        x,
        x.dtype,
        m as u64 * k as u64,
    )?;
    holds("a matrix product's result", y, y.dtype, results)?;
    if linear.n == 0 || linear.n > stride {
        let bound = format!("1 to {stride}, the matrix's columns");
        return Err(Error::refused("a dense layer's outputs", linear.n, bound));
    }
    if let Some(bias) = &linear.bias {
        holds(
            "a bias",
            bias,
            DType::F32,
            linear.n.next_multiple_of(4) as u64,
        )?;
    }
    if let Some(residual) = epilogue.residual {
        holds("a residual", residual, x.dtype, results)?;
    }
    let weights = [linear.weight.values()].into_iter();
    let read = weights
        .chain(linear.weight.scales())
        .chain(&linear.bias)
        .chain(epilogue.residual)
        .chain([x]);
    apart(
        &[("a matrix product's result", y)],
        &read.collect::<Vec<_>>(),
    )?;
    let caps = recorder.gpu().caps();
    // A result in f32 would be too good for weights in blocks that are rounded to f16.
    let coarse = linear.weight.storage() != Storage::F16 && y.dtype != DType::F16;
    let for_matrices = x.dtype == DType::F16
        && m >= MATRIX_ROWS
        && linear.weight.fits_f16()
        && !coarse
        && !epilogue.batch_invariant;
    let form = caps.matrix_form().filter(|_| for_matrices);
    let tile = Tile::new(m, caps);
    let vec = if (tile.by_lanes && form.is_none()) || !k.is_multiple_of(4) {
        1u32
    } else {
        4
    };
    let types = [x.dtype, linear.weight.values().dtype, y.dtype];
    let shader = match form {
        Some(form) => form
            .constants(Shader::new("matmul_coop"))
            .with("SOFTWARE", caps.software)
            .with("BY_LANES", false),
        None => Shader::new("matmul")
            .with("ROWS", tile.rows)
            .with("SLICES", tile.slices)
            .with("SPLIT", tile.split)
            .with("BY_LANES", tile.by_lanes),
    };
    let shader = shader
        .with("F16", types.contains(&DType::F16))
        .with("T", x.dtype.name())
        .with("O_TYPE", y.dtype.name())
        .with("VEC", vec)
        .with("HAS_BIAS", linear.bias.is_some())
        .with("HAS_RESIDUAL", epilogue.residual.is_some())
        .with("GATED", epilogue.gated)
        .with(
            "ACTIVATION",
            epilogue.activation.map_or("none", Activation::wgsl),
        );
    let shader = linear
        .weight
        .constants(shader, recorder.gpu().caps().software);
    let bindings: Vec<&Tensor> = [x, linear.weight.values(), y]
        .into_iter()
        .chain(linear.weight.scales())
        .chain(&linear.bias)
        .chain(epilogue.residual)
        .collect();
    let per_group = match form {
        Some(_) => 64,
        None if tile.split => tile.rows,
        None => 4 * tile.rows,
    };
    let groups = linear.n.div_ceil(64) as u64 * m.div_ceil(per_group) as u64;
    recorder.dispatch(&shader, [m, linear.n, k, stride], &bindings, groups)
}

/// The weights of a layer norm, or of RMSNorm, which has no shift. f32 `[d]`
#[derive(Clone, Debug)]
pub struct Norm {
    /// The scale.
    pub gamma: Tensor,
    /// The shift; without one the norm is RMSNorm, about zero.
    pub beta: Option<Tensor>,
    /// Added to the variance.
    pub eps: f32,
}

/// Y = norm(X), row by row. X, Y: `[R, d]`
///
/// # Errors
/// [`Error::Refused`] for tensors that do not hold what is said of them, and for a result in another's buffer.
pub fn norm(recorder: &mut Recorder, x: &Tensor, norm: &Norm, y: &Tensor) -> Result<()> {
    holds("a norm's result", y, x.dtype, x.len())?;
    record_norm(recorder, x, norm, None, y)
}

/// `Y[r] = norm(X[rows[r]])`: of those rows alone. X: `[R', d]`, rows: u32 `[R]`, Y: `[R, d]`
///
/// # Errors
/// [`Error::Refused`] for tensors that do not hold what is said of them, and for a result in another's buffer.
pub fn norm_rows(
    recorder: &mut Recorder,
    x: &Tensor,
    norm: &Norm,
    rows: &Tensor,
    y: &Tensor,
) -> Result<()> {
    let [width] = extents("a norm's gamma", &norm.gamma)?;
    holds("a norm's result", y, x.dtype, rows.len() * width as u64)?;
    holds("a norm's rows", rows, DType::U32, rows.len())?;
    record_norm(recorder, x, norm, Some(rows), y)
}

fn record_norm(
    recorder: &mut Recorder,
    x: &Tensor,
    norm: &Norm,
    rows: Option<&Tensor>,
    y: &Tensor,
) -> Result<()> {
    is_kept(recorder, "a norm's input", x.dtype)?;
    let [width] = extents("a norm's gamma", &norm.gamma)?;
    let x_rows = check_u32("a norm's input", x.len())? / width;
    let y_rows = match rows {
        Some(rows) => check_u32("a norm's result", rows.len() * width as u64)? / width,
        None => x_rows,
    };
    if x_rows == 0 {
        return Err(Error::refused("a norm's input", 0, "a row at least"));
    }
    holds("a norm's gamma", &norm.gamma, DType::F32, width as u64)?;
    if let Some(beta) = &norm.beta {
        holds("a norm's beta", beta, DType::F32, width as u64)?;
    }
    let read = [x, &norm.gamma].into_iter().chain(&norm.beta).chain(rows);
    apart(&[("a norm's result", y)], &read.collect::<Vec<_>>())?;
    let shader = Shader::new("norm")
        .with("F16", x.dtype == DType::F16)
        .with("T", x.dtype.name())
        .with("RMS", norm.beta.is_none())
        .with("HAS_ROWS", rows.is_some());
    let bindings: Vec<&Tensor> = [x, &norm.gamma, y]
        .into_iter()
        .chain(&norm.beta)
        .chain(rows)
        .collect();
    let params = [y_rows, width, norm.eps.to_bits(), x_rows];
    recorder.dispatch(&shader, params, &bindings, y_rows as u64)
}

/// Token embeddings and positions.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// A column for each token. `[d, V]`
    pub table: Matrix,
    /// Rows of the table that are tokens.
    pub vocab: u32,
    /// Added by position, where a model has such a table. f32 `[P, d]`
    pub positions: Option<Tensor>,
    /// The row of `positions` that position 0 takes.
    pub first_position: u32,
    /// The table's factor.
    pub scale: f32,
}

/// Where the tokens of a batch stand.
pub enum Places<'a> {
    /// ids are [B, T]: token t stands at position t.
    Sequence(u32),
    /// ids are `[R]`: the token of row r stands at position `lengths[r] - 1`.
    Lengths(&'a Tensor),
}

/// `X[r] = scale E[id] + positions[place]`, the latter where there are any. ids: u32 `[R]`, X: `[R, d]`
///
/// # Errors
/// [`Error::Refused`] for tensors that do not hold what is said of them, and for a result in another's buffer.
pub fn embed(
    recorder: &mut Recorder,
    ids: &Tensor,
    embedding: &Embedding,
    places: Places,
    x: &Tensor,
) -> Result<()> {
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    struct Params {
        rows: u32,
        width: u32,
        vocab_stride: u32,
        vocab: u32,
        scale: f32,
        first_position: u32,
        n_positions: u32,
        row_len: u32,
    }
    let width = embedding.table.k();
    is_kept(recorder, "a batch's embeddings", x.dtype)?;
    embedding.table.is_kept(recorder)?;
    let types = [embedding.table.values().dtype, x.dtype];
    let shader = Shader::new("embed")
        .with("F16", types.contains(&DType::F16))
        .with("T", x.dtype.name())
        .with("HAS_POSITIONS", embedding.positions.is_some())
        .with("HAS_LENGTHS", matches!(places, Places::Lengths(_)));
    let shader = embedding.table.constants(shader, false);
    let mut bindings = vec![ids, embedding.table.values(), x];
    bindings.extend(&embedding.positions);
    let row_len = match places {
        Places::Sequence(0) => {
            let bound = "the tokens of a row, 1 at least";
            return Err(Error::refused("a sequence's places", 0, bound));
        }
        Places::Sequence(len) => len,
        Places::Lengths(lengths) => {
            holds("lengths", lengths, DType::U32, ids.len())?;
            if embedding.positions.is_some() {
                bindings.push(lengths);
            }
            1
        }
    };
    bindings.extend(embedding.table.scales());
    let params = Params {
        rows: check_u32("the tokens of a batch", ids.len())?,
        width,
        vocab_stride: embedding.table.stride(),
        vocab: embedding.vocab,
        scale: embedding.scale,
        first_position: embedding.first_position,
        n_positions: match &embedding.positions {
            Some(table) => extents::<2>("positions", table)?[0],
            None => 0,
        },
        row_len,
    };
    let elements = check_u32("a batch's embeddings", ids.len() * width as u64)? as u64;
    holds("a batch's embeddings", x, x.dtype, elements)?;
    holds("ids", ids, DType::U32, ids.len())?;
    if let Some(positions) = &embedding.positions {
        let elements = width as u64 * params.n_positions as u64;
        holds("positions", positions, DType::F32, elements)?;
    }
    if embedding.vocab == 0 || embedding.vocab > params.vocab_stride {
        let bound = format!("1 to {}", params.vocab_stride);
        return Err(Error::refused("a vocabulary", embedding.vocab, bound));
    }
    let (read, after) = (&bindings[..2], &bindings[3..]);
    apart(&[("a batch's embeddings", x)], &[read, after].concat())?;
    recorder.dispatch(&shader, params, &bindings, elements.div_ceil(THREADS))
}

/// Beams take over their parents' histories: permutes `rows` and enters each row at its own position.
/// parents, lengths: u32 `[R]`, rows: u32 `[R, L]`
///
/// # Errors
/// [`Error::Refused`] for tensors that do not hold what is said of them, and for a result in another's buffer.
pub fn reorder(
    recorder: &mut Recorder,
    parents: &Tensor,
    lengths: &Tensor,
    rows: &Tensor,
    beams: u32,
) -> Result<()> {
    let [n, capacity] = extents("rows", rows)?;
    if beams == 0 || !n.is_multiple_of(beams) {
        let bound = format!("a divisor of the {n} rows");
        return Err(Error::refused("beams", beams, bound));
    }
    let sources = n / beams;
    check_u32("rows", rows.len())?;
    holds("rows", rows, DType::U32, rows.len())?;
    holds("parents", parents, DType::U32, n as u64)?;
    holds("lengths", lengths, DType::U32, n as u64)?;
    apart(&[("rows", rows)], &[parents, lengths])?;
    let shader = Shader::new("reorder").with("BEAMS", beams);
    let groups = (sources as u64 * capacity as u64).div_ceil(THREADS);
    recorder.dispatch(
        &shader,
        [sources, capacity, 0, 0],
        &[parents, lengths, rows],
        groups,
    )
}

/// What `choose` reads and writes.
pub struct Choice<'a> {
    /// f32 `[R, V]`
    pub logits: &'a Tensor,
    /// A bit a token: the first generated token's, then those of later ones. u32 [2, V / 32 rounded up]
    pub allowed: &'a Tensor,
    /// Moved on by one. u32 `[R]`
    pub lengths: &'a Tensor,
    /// Token and bits of its log-probability, best first. u32 `[R, candidates, 2]`
    pub chosen: &'a Tensor,
    /// Set to the best token. u32 `[R]`
    pub ids: &'a Tensor,
    /// Log-probabilities are over the allowed tokens, not over all.
    pub renormalize: bool,
}

/// The most likely tokens of each row.
///
/// # Errors
/// [`Error::Refused`] for tensors that do not hold what is said of them, and for a result in another's buffer.
pub fn choose(recorder: &mut Recorder, choice: Choice) -> Result<()> {
    let [rows, vocab] = extents("logits", choice.logits)?;
    let [_, mask_words] = extents("allowed tokens", choice.allowed)?;
    let [_, candidates, _] = extents("chosen tokens", choice.chosen)?;
    let words = vocab.div_ceil(32) as u64;
    holds(
        "logits",
        choice.logits,
        DType::F32,
        rows as u64 * vocab as u64,
    )?;
    let masks = 2 * words.max(mask_words as u64);
    holds("allowed tokens", choice.allowed, DType::U32, masks)?;
    holds("lengths", choice.lengths, DType::U32, rows as u64)?;
    holds("ids", choice.ids, DType::U32, rows as u64)?;
    holds(
        "chosen tokens",
        choice.chosen,
        DType::U32,
        2 * rows as u64 * candidates as u64,
    )?;
    let written = [
        ("lengths", choice.lengths),
        ("chosen tokens", choice.chosen),
        ("ids", choice.ids),
    ];
    apart(&written, &[choice.logits, choice.allowed])?;
    let shader = Shader::new("choose")
        .with("CANDIDATES", candidates)
        .with("RENORMALIZE", choice.renormalize);
    let params = [rows, vocab, mask_words, 0];
    let bindings = [
        choice.logits,
        choice.allowed,
        choice.lengths,
        choice.chosen,
        choice.ids,
    ];
    recorder.dispatch(&shader, params, &bindings, rows as u64)
}
