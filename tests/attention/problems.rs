//! What a problem may not be.

use super::*;

/// Tensors that bad problems are made of: views into two large buffers.
pub struct Parts {
    pub input: Tensor,
    integers: Tensor,
    pub output: Tensor,
}

impl Parts {
    pub fn new() -> Self {
        let make = |name, dtype| gpu().empty(name, dtype, &[1 << 16]).unwrap();
        Parts {
            input: make("input", F32),
            integers: make("integers", DType::U32),
            output: make("output", F32),
        }
    }

    /// A sound problem: B 2, H 4, Hk 2, Q 5, K 7, D 12, Dv 8.
    pub fn tensors(&self) -> Tensors<'_> {
        Tensors::new(
            dense(&self.input, [2, 4, 5, 12]),
            dense(&self.input, [2, 2, 7, 12]),
            dense(&self.input, [2, 2, 7, 8]),
            dense(&self.output, [2, 4, 5, 8]),
        )
    }
}

pub fn dense(tensor: &Tensor, extents: [u32; 4]) -> View<'_> {
    let [_, h, l, d] = extents;
    View::new(tensor, extents, 0, [h * l * d, l * d, d]).unwrap()
}

/// The argument that a refusal names.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: qkv::Result<T>) -> String {
    match result {
        Err(Error::Refused { argument, .. }) => argument,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn bad_problems_are_refused_by_the_argument_at_fault() {
    let parts = Parts::new();
    let tensor = |dtype, shape: &[u32]| gpu().empty("odd", dtype, shape).unwrap();
    let odd = [
        tensor(DType::U32, &[3]),
        tensor(F32, &[2]),
        tensor(DType::U32, &[2, 6]),
        tensor(F32, &[2, 7]),
        tensor(F32, &[2, 4, 5, 6]),
        tensor(DType::U32, &[2, 4, 5, 7]),
        tensor(F32, &[2, 4, 5, 7]),
    ];
    let [
        three_lengths,
        float_lengths,
        short_rows,
        float_rows,
        narrow_weights,
        integer_weights,
        weights,
    ] = &odd;
    // Over the output's buffer, and over the input's.
    let over = |tensor: &Tensor, dtype, shape: &[u32]| {
        Tensor::from_wgpu(tensor.buffer().clone(), dtype, shape).unwrap()
    };
    let weights_in_output = over(&parts.output, F32, &[2, 4, 5, 7]);
    let weights_in_input = over(&parts.input, F32, &[2, 4, 5, 7]);
    let lengths_in_output = over(&parts.output, DType::U32, &[2]);
    let rows_in_output = over(&parts.output, DType::U32, &[2, 7]);

    type Spoil<'a> = Box<dyn Fn(&mut Tensors<'a>, &mut Options) + 'a>;
    fn table<'a>(
        name: &'static str,
        spoil: impl Fn(&mut Tensors<'a>, &mut Options) + 'a,
    ) -> (&'static str, Spoil<'a>) {
        (name, Box::new(spoil))
    }
    let (input, output) = (&parts.input, &parts.output);
    let integers = &parts.integers;
    let view = dense;
    let cases = [
        table("q", |t, _| t.q = view(input, [0, 4, 5, 12])),
        table("q", |t, _| t.q = view(input, [2, 0, 5, 12])),
        table("q", |t, _| t.q = view(input, [2, 4, 5, 0])),
        table("k", |t, _| t.k = view(input, [2, 0, 7, 12])),
        table("k", |t, _| t.k = view(input, [0, 2, 7, 12])),
        table("v", |t, _| t.v = view(input, [2, 2, 7, 0])),
        table("k's batch", |t, _| t.k = view(input, [3, 2, 7, 12])),
        table("k's heads", |t, _| t.k = view(input, [2, 3, 7, 12])),
        table("k's heads", |t, _| t.k = view(input, [2, 8, 7, 12])),
        table("k's head dim", |t, _| t.k = view(input, [2, 2, 7, 8])),
        table("v", |t, _| t.v = view(input, [2, 2, 6, 8])),
        table("v", |t, _| t.v = view(input, [2, 4, 7, 8])),
        table("v", |t, _| t.v = view(input, [1, 2, 7, 8])),
        table("out", |t, _| t.out = view(output, [2, 4, 5, 12])),
        table("out", |t, _| t.out = view(output, [2, 4, 6, 8])),
        table("out", |t, _| t.out = view(input, [2, 4, 5, 8])),
        table("the head dim", |t, _| {
            t.q = view(input, [2, 4, 5, MAX_HEAD_DIM + 1]);
            t.k = view(input, [2, 2, 7, MAX_HEAD_DIM + 1]);
        }),
        table("the head dim", |t, _| {
            t.v = view(input, [2, 2, 7, MAX_HEAD_DIM + 1]);
            t.out = view(output, [2, 4, 5, MAX_HEAD_DIM + 1]);
        }),
        table("q", |t, _| t.q = view(integers, [2, 4, 5, 12])),
        table("k", |t, _| t.k = view(integers, [2, 2, 7, 12])),
        table("out", |t, _| t.out = view(integers, [2, 4, 5, 8])),
        table("v", |t, _| t.v = view(integers, [2, 2, 7, 8])),
        table("scale", |_, o| o.scale = Some(f32::NAN)),
        table("softcap", |_, o| o.softcap = Some(-1.0)),
        table("softcap", |_, o| o.softcap = Some(0.0)),
        table("softcap", |_, o| o.softcap = Some(f32::NAN)),
        table("window", |_, o| o.window = [Some(u32::MAX), None]),
        table("window", |_, o| {
            (o.causal, o.window) = (true, [None, Some(1)])
        }),
        table("stage", |_, o| o.stage = Stage::Raw),
        table("q_offset", |t, _| t.q_offset = Some(three_lengths)),
        table("prefix_len", |t, _| t.prefix_len = Some(float_lengths)),
        table("alibi", |t, _| t.alibi = Some(three_lengths)),
        table("sinks", |t, _| t.sinks = Some(float_lengths)),
        table("lse", |t, _| t.lse = Some(weights)),
        table("bias", |t, _| t.bias = Some(view(input, [2, 4, 5, 6]))),
        table("bias", |t, _| t.bias = Some(view(integers, [2, 4, 5, 7]))),
        table("mask", |t, _| t.mask = Some(view(input, [2, 4, 5, 7]))),
        table("t5", |t, _| t.t5 = Some(weights)),
        table("t5", |_, o| {
            o.t5 = Some(T5 {
                bidirectional: true,
                max_distance: 9,
            })
        }),
        table("q's batch", |t, _| t.cu_q = Some(three_lengths)),
        table("k's batch", |t, _| t.cu_k = Some(three_lengths)),
        table("extra", |t, _| t.extra = vec![("a", weights)]),
        table("scale", |_, o| o.scale = Some(f32::INFINITY)),
        table("kv_len", |t, _| t.kv_len = Some(three_lengths)),
        table("kv_len", |t, _| t.kv_len = Some(float_lengths)),
        table("out", |t, _| t.kv_len = Some(&lengths_in_output)),
        table("rows", |t, _| t.rows = Some(short_rows)),
        table("rows", |t, _| t.rows = Some(float_rows)),
        table("out", |t, _| t.rows = Some(&rows_in_output)),
        table("weights", |t, _| t.weights = Some(narrow_weights)),
        table("weights", |t, _| t.weights = Some(integer_weights)),
        table("weights", |t, _| t.weights = Some(&weights_in_output)),
        table("weights", |t, _| t.weights = Some(&weights_in_input)),
        table("route", |t, o| {
            t.weights = Some(weights);
            o.route = Some(Route::Prefill);
        }),
        table("route", |t, o| {
            t.weights = Some(weights);
            o.route = Some(Route::Decode);
        }),
        table("splits", |_, o| {
            o.route = Some(Route::Decode);
            o.splits = Some(0);
        }),
        table("splits", |_, o| {
            o.route = Some(Route::Prefill);
            o.splits = Some(2);
        }),
        table("splits", |_, o| {
            o.route = Some(Route::ThreePass);
            o.splits = Some(2);
        }),
        // An output whose rows share cells would be written by several workgroups at once.
        table("out", |t, _| {
            t.out = View::new(output, [2, 4, 5, 8], 0, [160, 0, 8]).unwrap();
        }),
        table("out", |t, _| {
            t.out = View::new(output, [2, 4, 5, 8], 0, [160, 40, 7]).unwrap();
        }),
        // More scores than 32 bits count, though of few cells.
        table("q", |t, o| {
            let zero = [0, 0, 0];
            t.q = View::new(input, [1, 1, 1 << 16, 1], 0, zero).unwrap();
            t.k = View::new(input, [1, 1, 70_000, 1], 0, zero).unwrap();
            t.v = View::new(input, [1, 1, 70_000, 1], 0, zero).unwrap();
            t.out = View::new(output, [1, 1, 1 << 16, 1], 0, [0, 0, 1]).unwrap();
            o.route = Some(Route::ThreePass);
        }),
    ];
    let count = cases.len();
    for (ix, (argument, spoil)) in cases.into_iter().enumerate() {
        let (mut tensors, mut options) = (parts.tensors(), Options::default());
        spoil(&mut tensors, &mut options);
        let mut recorder = Recorder::new(gpu());
        let result = record(&mut recorder, &tensors, &options);
        assert_eq!(refused(result), argument, "case {ix}");
    }
    println!("{count} problems refused");
    assert_eq!(count, 61);
    assert!(Problem::new(&parts.tensors(), &Options::default()).is_ok());
}

#[test]
fn views_outside_their_tensor_are_refused() {
    let tensor = gpu().empty("tensor", F32, &[2, 3, 4, 5]).unwrap();
    assert!(View::bhld(&tensor).is_ok());
    let bad = [
        ([2, 3, 4, 5], 1, [60, 20, 5]),
        ([2, 3, 4, 5], 0, [61, 20, 5]),
        ([2, 3, 4, 5], 0, [60, 21, 5]),
        ([2, 3, 4, 5], 0, [60, 20, 6]),
        ([3, 3, 4, 5], 0, [60, 20, 5]),
        ([1, 1, 1, 121], 0, [0, 0, 0]),
        ([1, 1, 1, 1], 120, [0, 0, 0]),
        ([2, 2, 2, 2], u32::MAX, [u32::MAX; 3]),
        ([u32::MAX; 4], 0, [u32::MAX; 3]),
    ];
    for (extents, offset, strides) in bad {
        let argument = refused(View::new(&tensor, extents, offset, strides));
        assert_eq!(argument, "a view");
    }
    assert_eq!(
        refused(View::packed(&tensor, [2, 3, 4, 5], 15, 1)),
        "a view"
    );
    let flat = gpu().empty("flat", F32, &[120]).unwrap();
    assert_eq!(refused(View::bhld(&flat)), "a view of [B, H, L, D]");
    let short = Tensor::from_wgpu(flat.buffer().clone(), F32, &[121]);
    assert_eq!(refused(short), "buffer");
}
