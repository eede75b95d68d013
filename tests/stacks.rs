//! Encoder-decoder stacks of every kind that a `Spec` can describe, with random weights, against the
//! oracle's stack; and generation against the same stack's one-shot forward.
#![cfg(feature = "models")]

#[path = "support/compare.rs"]
mod compare;
#[path = "support/grid.rs"]
mod grid;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use compare::{Tolerance, compare_rows, round_to, tolerance};
use grid::Random;
use qkv::cache::{Cache, Extents};
use qkv::generate::{EarlyStopping, Generator, Sequence, Settings};
use qkv::gpu::{DType, Gpu, Recorder};
use qkv::layers::NormOrder;
use qkv::model::{Memory, Model, Padded, Positions, Source, Spec, Stack};
use qkv::ops::Activation;
use qkv::reference;
use safetensors::tensor::{Dtype, TensorView};

fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| Gpu::new().expect("a device: see scripts/with-gpu"))
}

/// Stacks that differ in everything that a `Spec` can say.
fn specs() -> Vec<(&'static str, Spec)> {
    let stack = |layers, heads, ffn| Stack { layers, heads, ffn };
    vec![
        (
            "pre-norm, learned positions from row 2, GELU, two vocabularies",
            Spec {
                width: 24,
                source_vocab: 37,
                target_vocab: 29,
                encoder: stack(2, 4, 40),
                decoder: stack(1, 3, 36),
                activation: Activation::Gelu,
                order: NormOrder::Pre,
                final_norm: true,
                norm_eps: 1e-5,
                embed_scale: 1.0,
                positions: Positions::Learned { first: 2 },
                max_positions: 16,
                shared_embeddings: false,
                tied_logits: true,
                logits_bias: true,
            },
        ),
        (
            "post-norm, sinusoidal, SiLU, one table for all, no bias, odd widths",
            Spec {
                width: 18,
                source_vocab: 31,
                target_vocab: 31,
                encoder: stack(1, 3, 22),
                decoder: stack(2, 2, 25),
                activation: Activation::Silu,
                order: NormOrder::Post,
                final_norm: false,
                norm_eps: 1e-6,
                embed_scale: 18f32.sqrt(),
                positions: Positions::Sinusoidal,
                max_positions: 20,
                shared_embeddings: true,
                tied_logits: true,
                logits_bias: false,
            },
        ),
        (
            "pre-norm without final norms, learned positions, GELU by tanh, three tables",
            Spec {
                width: 15,
                source_vocab: 23,
                target_vocab: 41,
                encoder: stack(3, 5, 14),
                decoder: stack(2, 3, 17),
                activation: Activation::GeluTanh,
                order: NormOrder::Pre,
                final_norm: false,
                norm_eps: 1e-5,
                embed_scale: 2.0,
                positions: Positions::Learned { first: 0 },
                max_positions: 12,
                shared_embeddings: false,
                tied_logits: false,
                logits_bias: true,
            },
        ),
        (
            "post-norm with final norms, ReLU, shared embeddings and logits of their own",
            Spec {
                width: 32,
                source_vocab: 50,
                target_vocab: 50,
                encoder: stack(1, 2, 64),
                decoder: stack(3, 4, 48),
                activation: Activation::Relu,
                order: NormOrder::Post,
                final_norm: true,
                norm_eps: 1e-5,
                embed_scale: 1.0,
                positions: Positions::Sinusoidal,
                max_positions: 32,
                shared_embeddings: true,
                tied_logits: false,
                logits_bias: false,
            },
        ),
    ]
}

/// Makes weights: each goes to the file under its name and to the oracle.
struct Maker {
    random: Random,
    storage: DType,
    file: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Maker {
    /// Numbers around `middle`, as they are stored: matrices as `storage`, the rest as f32.
    fn values(&mut self, name: &str, shape: &[usize], middle: f64, spread: f64) -> Vec<f64> {
        let storage = match shape.len() == 2 && !name.contains("positions") {
            true => self.storage,
            false => DType::F32,
        };
        let values: Vec<f64> = (0..shape.iter().product())
            .map(|_| round_to(storage.wgsl(), middle + spread * self.random.float()))
            .collect();
        let floats = values.iter().map(|&x| x as f32).collect();
        self.file.insert(name.to_string(), (shape.to_vec(), floats));
        values
    }

    /// A dense layer that keeps the magnitude of what goes through.
    fn linear(&mut self, name: &str, n_in: usize, n_out: usize) -> reference::Linear {
        let spread = (3.0 / n_in as f64).sqrt();
        reference::Linear {
            n_in,
            weight: self.values(&format!("{name}.weight"), &[n_out, n_in], 0.0, spread),
            bias: Some(self.values(&format!("{name}.bias"), &[n_out], 0.0, 0.1)),
        }
    }

    fn norm(&mut self, name: &str, spec: &Spec) -> reference::Norm {
        let d = spec.width as usize;
        reference::Norm::Layer {
            weight: self.values(&format!("{name}.weight"), &[d], 1.0, 0.3),
            bias: self.values(&format!("{name}.bias"), &[d], 0.0, 0.1),
            eps: f64::from(spec.norm_eps),
        }
    }

    fn attention(&mut self, name: &str, d: usize, heads: u32) -> reference::AttentionWeights {
        let mut linear = |part: &str| self.linear(&format!("{name}.{part}_proj"), d, d);
        reference::AttentionWeights {
            heads: heads as usize,
            kv_heads: heads as usize,
            q: linear("q"),
            k: linear("k"),
            v: linear("v"),
            o: linear("out"),
        }
    }

    fn feed_forward(&mut self, layer: &str, spec: &Spec, stack: Stack) -> reference::FeedForward {
        let (d, ffn) = (spec.width as usize, stack.ffn as usize);
        reference::FeedForward {
            up: self.linear(&format!("{layer}.fc1"), d, ffn),
            activation: match spec.activation {
                Activation::Relu => reference::Activation::Relu,
                Activation::Gelu => reference::Activation::Gelu,
                Activation::GeluTanh => reference::Activation::GeluTanh,
                Activation::Silu => reference::Activation::Silu,
            },
            down: self.linear(&format!("{layer}.fc2"), ffn, d),
        }
    }

    fn positions(&mut self, spec: &Spec) -> Vec<f64> {
        let (n, d) = (spec.max_positions as usize, spec.width as usize);
        match spec.positions {
            Positions::Sinusoidal => reference::sinusoids(n, d),
            Positions::Learned { first } => {
                let first = first as usize;
                let name = "model.encoder.embed_positions.weight";
                let table = self.values(name, &[n + first, d], 0.0, 1.0);
                // The oracle has one table for both sides.
                let other = "model.decoder.embed_positions.weight";
                self.file.insert(other.into(), self.file[name].clone());
                table[first * d..].to_vec()
            }
        }
    }

    fn stack(&mut self, spec: &Spec) -> reference::Stack {
        let d = spec.width as usize;
        let pre = spec.order == NormOrder::Pre;
        let positions = self.positions(spec);
        let mut table = |name: &str, vocab: u32| {
            self.values(&format!("{name}.weight"), &[vocab as usize, d], 0.0, 1.0)
        };
        let source_embedding = match spec.shared_embeddings {
            true => table("model.shared", spec.source_vocab),
            false => table("model.encoder.embed_tokens", spec.source_vocab),
        };
        let target_embedding = match spec.shared_embeddings {
            true => None,
            false => Some(table("model.decoder.embed_tokens", spec.target_vocab)),
        };
        let output = match spec.tied_logits {
            true => None,
            false => Some(table("lm_head", spec.target_vocab)),
        };
        let vocab = spec.target_vocab as usize;
        let logits_bias = spec
            .logits_bias
            .then(|| self.values("final_logits_bias", &[1, vocab], 0.0, 0.5));
        let encoder = (0..spec.encoder.layers).map(|ix| {
            let layer = format!("model.encoder.layers.{ix}");
            reference::EncoderLayer {
                self_attention: self.attention(
                    &format!("{layer}.self_attn"),
                    d,
                    spec.encoder.heads,
                ),
                self_norm: self.norm(&format!("{layer}.self_attn_layer_norm"), spec),
                feed_forward: self.feed_forward(&layer, spec, spec.encoder),
                feed_forward_norm: self.norm(&format!("{layer}.final_layer_norm"), spec),
            }
        });
        let encoder = encoder.collect();
        let heads = spec.decoder.heads;
        let decoder = (0..spec.decoder.layers).map(|ix| {
            let layer = format!("model.decoder.layers.{ix}");
            reference::DecoderLayer {
                self_attention: self.attention(&format!("{layer}.self_attn"), d, heads),
                self_norm: self.norm(&format!("{layer}.self_attn_layer_norm"), spec),
                cross_attention: self.attention(&format!("{layer}.encoder_attn"), d, heads),
                cross_norm: self.norm(&format!("{layer}.encoder_attn_layer_norm"), spec),
                feed_forward: self.feed_forward(&layer, spec, spec.decoder),
                feed_forward_norm: self.norm(&format!("{layer}.final_layer_norm"), spec),
            }
        });
        let decoder = decoder.collect();
        let mut final_norm = |name| spec.final_norm.then(|| self.norm(name, spec));
        reference::Stack {
            d_model: d,
            norm_place: match pre {
                true => reference::NormPlace::Pre,
                false => reference::NormPlace::Post,
            },
            embedding_scale: f64::from(spec.embed_scale),
            positions,
            source_embedding,
            target_embedding,
            output,
            logits_bias,
            encoder_embedding_norm: None,
            decoder_embedding_norm: None,
            encoder,
            decoder,
            encoder_norm: final_norm("model.encoder.layer_norm"),
            decoder_norm: final_norm("model.decoder.layer_norm"),
        }
    }
}

/// A model on the device and the oracle of the same weights.
fn make(gpu: &Gpu, spec: &Spec, dtype: DType) -> (Model, reference::Stack) {
    let mut maker = Maker {
        random: Random::new(u64::from(spec.width)),
        storage: dtype,
        file: BTreeMap::new(),
    };
    let oracle = maker.stack(spec);
    let views = maker.file.iter().map(|(name, (shape, values))| {
        let bytes = bytemuck::cast_slice(values);
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    let source = Source::Directory(dir.path().to_owned());
    let model = Model::load_spec(gpu, &source, spec, dtype, &mut |_, _| {}).unwrap();
    (model, oracle)
}

/// Rows of tokens of those lengths.
fn tokens(seed: u64, lengths: &[usize], vocab: u32) -> Vec<Vec<u32>> {
    let mut random = Random::new(seed);
    let mut row = |&n: &usize| (0..n).map(|_| random.below(vocab)).collect();
    lengths.iter().map(&mut row).collect()
}

/// Sources of unequal lengths.
fn sources(spec: &Spec) -> Vec<Vec<u32>> {
    tokens(1, &[5, 9, 2], spec.source_vocab)
}

/// Targets of unequal lengths.
fn targets(spec: &Spec) -> Vec<Vec<u32>> {
    tokens(2, &[7, 4, 8], spec.target_vocab)
}

/// What f32 stacks may be off by: a few layers' sums, one after the other.
fn exact() -> Tolerance {
    tolerance("f32", 64)
}

/// Compares everything that a model gives for a padded batch with the oracle; the answer is the worst
/// ratio of error to tolerance.
fn judge(model: &Model, oracle: &reference::Stack, tol: Tolerance) -> Result<f64, String> {
    let (gpu, spec) = (model.gpu(), model.spec());
    let sources = Padded::new(&sources(spec), 3);
    let targets = Padded::new(&targets(spec), 3);
    let memory = model.encode(&sources, true).unwrap();
    let forward = model.forward(&memory, &targets, true).unwrap();

    let lengths: Vec<usize> = sources.lengths.iter().map(|&n| n as usize).collect();
    let mask = reference::mask_of_lengths(&lengths, sources.len as usize);
    let encoded = oracle.encode(&sources.ids, lengths.len(), Some(&mask));
    let decoded = oracle.decode(&targets.ids, lengths.len(), &encoded.states, Some(&mask));

    let floats = |tensor| gpu.read_floats(tensor).unwrap();
    let mut worst = 0f64;
    for (name, got, want, row) in [
        ("states", &memory.states, &encoded.states, spec.width),
        (
            "logits",
            &forward.logits,
            &decoded.logits,
            spec.target_vocab,
        ),
    ] {
        worst = worst.max(compare_rows(name, &floats(got), want, row as usize, tol)?);
    }
    for (name, got, want, row, layers) in [
        (
            "encoder attention",
            &memory.attentions,
            &encoded.attentions,
            sources.len,
            spec.encoder.layers,
        ),
        (
            "decoder attention",
            &forward.decoder_attentions,
            &decoded.self_attentions,
            targets.len,
            spec.decoder.layers,
        ),
        (
            "cross-attention",
            &forward.cross_attentions,
            &decoded.cross_attentions,
            sources.len,
            spec.decoder.layers,
        ),
    ] {
        assert_eq!([got.len(), want.len()], [layers as usize; 2]);
        for (got, want) in got.iter().zip(want) {
            worst = worst.max(compare_rows(name, &floats(got), want, row as usize, tol)?);
        }
    }
    Ok(worst)
}

#[test]
fn every_kind_of_stack_equals_the_oracle() {
    for (name, spec) in specs() {
        let (model, oracle) = make(gpu(), &spec, DType::F32);
        let worst = judge(&model, &oracle, exact()).unwrap_or_else(|e| panic!("{name}: {e}"));
        println!("{name}: {worst:.3} of the tolerance");
    }
}

#[test]
fn stacks_in_f16_stay_within_the_rounding_of_their_activations() {
    if !gpu().caps().f16 {
        println!("this device has no f16");
        return;
    }
    for (name, spec) in specs() {
        let (model, oracle) = make(gpu(), &spec, DType::F16);
        // Each layer stores a few activations, rounding them by 2^-11 at most; the errors add up and
        // the layers behind pass them on.
        let layers = f64::from(spec.encoder.layers + spec.decoder.layers);
        let rounding = layers * 12.0 * 2f64.powi(-11);
        let tol = Tolerance {
            atol: rounding,
            rtol: rounding,
        };
        let worst = judge(&model, &oracle, tol).unwrap_or_else(|e| panic!("{name}: {e}"));
        println!("{name}: {worst:.3} of the tolerance");
        assert!(judge(&model, &oracle, exact()).is_err(), "it is f16");
    }
}

#[test]
fn another_stack_is_objected_to() {
    let (_, spec) = specs().swap_remove(1);
    let (model, oracle) = make(gpu(), &spec, DType::F32);
    let spoils: [fn(&mut reference::Stack); 5] = [
        |oracle| oracle.norm_place = reference::NormPlace::Pre,
        |oracle| oracle.embedding_scale *= 1.001,
        |oracle| oracle.positions.rotate_left(oracle.d_model),
        |oracle| oracle.decoder[1].feed_forward.activation = reference::Activation::GeluTanh,
        |oracle| oracle.logits_bias = Some(vec![0.01; 31]),
    ];
    for (ix, spoil) in spoils.iter().enumerate() {
        let mut other = oracle.clone();
        spoil(&mut other);
        assert!(judge(&model, &other, exact()).is_err(), "{ix}");
    }
}

/// Logits of every target, [T, V] each, without what the padding gave.
fn logits(model: &Model, memory: &Memory, targets: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let padded = Padded::new(targets, 0);
    let forward = model.forward(memory, &padded, false).unwrap();
    let all = model.gpu().read_floats(&forward.logits).unwrap();
    let vocab = model.spec().target_vocab as usize;
    all.chunks(padded.len as usize * vocab)
        .zip(targets)
        .map(|(row, target)| {
            row[..target.len() * vocab]
                .iter()
                .map(|&x| x.into())
                .collect()
        })
        .collect()
}

fn singles(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

#[test]
fn a_padded_batch_equals_its_singles() {
    for (name, spec) in specs() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let (sources, targets) = (sources(&spec), targets(&spec));
        let memory = model.encode(&Padded::new(&sources, 0), false).unwrap();
        let batch = logits(&model, &memory, &targets);
        for (ix, want) in batch.iter().enumerate() {
            let memory = model
                .encode(&Padded::new(&sources[ix..=ix], 0), false)
                .unwrap();
            let alone = logits(&model, &memory, &targets[ix..=ix]);
            let vocab = spec.target_vocab as usize;
            compare_rows(name, &singles(&alone[0]), want, vocab, exact()).unwrap();
        }
    }
}

#[test]
fn decoding_step_by_step_equals_the_whole() {
    for (name, spec) in specs() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let gpu = model.gpu();
        let targets = tokens(3, &[8, 8, 8], spec.target_vocab);
        let sources = Padded::new(&sources(&spec), 0);
        let memory = model.encode(&sources, false).unwrap();
        let whole = logits(&model, &memory, &targets);
        let extents = Extents {
            layers: spec.decoder.layers,
            rows: 3,
            kv_heads: spec.decoder.heads,
            capacity: 11,
            head_dim: spec.width / spec.decoder.heads,
        };
        let mut cache = Cache::new(gpu, DType::F32, extents, false).unwrap();
        // Nothing may be read of the cache that was not written.
        for block in cache.k.iter_mut().chain(&mut cache.v) {
            let nan = vec![f32::NAN; block.len() as usize];
            *block = gpu
                .upload_floats("cache", DType::F32, block.shape(), &nan)
                .unwrap();
        }
        let vocab = spec.target_vocab as usize;
        let out = gpu
            .empty("logits", DType::F32, &[3, spec.target_vocab])
            .unwrap();
        for t in 0..8 {
            cache.lengths = gpu.upload_u32("lengths", &[3], &[t as u32 + 1; 3]).unwrap();
            let ids: Vec<u32> = targets.iter().map(|target| target[t]).collect();
            let ids = gpu.upload_u32("ids", &[3], &ids).unwrap();
            let mut recorder = Recorder::new(gpu);
            model
                .record_step(&mut recorder, &memory, &cache, &ids, &out)
                .unwrap();
            gpu.run(&recorder.finish().unwrap()).unwrap();
            let got = gpu.read_floats(&out).unwrap();
            let want: Vec<f64> = whole
                .iter()
                .flat_map(|row| row[t * vocab..][..vocab].to_vec())
                .collect();
            compare_rows(&format!("{name}, step {t}"), &got, &want, vocab, exact()).unwrap();
        }
    }
}

const START: u32 = 1;

fn settings(beams: u32) -> Settings {
    Settings {
        beams,
        max_tokens: 10,
        length_penalty: 0.8,
        early_stopping: EarlyStopping::No,
        start: START,
        eos: vec![0],
        forced_bos: None,
        forced_eos: None,
        suppressed: vec![START],
        bad_words: Vec::new(),
        renormalize: false,
        begin_suppressed: vec![0, 2],
    }
}

fn generate(model: &Model, memory: &Memory, settings: &Settings) -> Vec<Sequence> {
    let mut generator = Generator::new(model, memory, settings).unwrap();
    for step in &mut generator {
        step.unwrap();
    }
    assert!(generator.done());
    generator.sequences()
}

/// The log-probabilities of every token before each token of the sequences, by one forward pass.
/// [T, V] each.
fn teacher_forced(model: &Model, memory: &Memory, sequences: &[Sequence]) -> Vec<Vec<f64>> {
    let inputs: Vec<Vec<u32>> = sequences
        .iter()
        .map(|sequence| {
            let (_, before) = sequence.tokens.split_last().expect("a token");
            [&[START], before].concat()
        })
        .collect();
    let vocab = model.spec().target_vocab as usize;
    logits(model, memory, &inputs)
        .iter()
        .map(|row| reference::log_softmax(row, vocab))
        .collect()
}

/// The sum of a sequence's log-probabilities.
fn score(log_probs: &[f64], sequence: &Sequence) -> f64 {
    let vocab = log_probs.len() / sequence.tokens.len();
    let rows = log_probs.chunks(vocab).zip(&sequence.tokens);
    rows.map(|(row, &token)| row[token as usize]).sum()
}

#[test]
fn greedy_decoding_follows_the_forward_pass() {
    for (name, spec) in specs() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let sources = Padded::new(&sources(&spec), 0);
        let memory = model.encode(&sources, false).unwrap();
        let settings = settings(1);
        let sequences = generate(&model, &memory, &settings);
        let log_probs = teacher_forced(&model, &memory, &sequences);
        for (sequence, log_probs) in sequences.iter().zip(&log_probs) {
            println!("{name}: {:?} {}", sequence.tokens, sequence.score);
            for (step, row) in log_probs.chunks(spec.target_vocab as usize).enumerate() {
                let open = |&token: &usize| {
                    let token = token as u32;
                    !settings.suppressed.contains(&token)
                        && (step > 0 || !settings.begin_suppressed.contains(&token))
                };
                let best = (0..row.len())
                    .filter(open)
                    .max_by(|&a, &b| row[a].total_cmp(&row[b]))
                    .expect("a token");
                assert_eq!(sequence.tokens[step], best as u32, "{name}, step {step}");
            }
            assert!((score(log_probs, sequence) - f64::from(sequence.score)).abs() < 1e-3);
        }
    }
}

#[test]
fn beam_search_scores_what_it_wrote() {
    let mut differ = 0;
    for (name, spec) in specs() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let sources = sources(&spec);
        let memory = model.encode(&Padded::new(&sources, 0), false).unwrap();
        let greedy = generate(&model, &memory, &settings(1));
        for beams in [2, 4] {
            let settings = settings(beams);
            let sequences = generate(&model, &memory, &settings);
            let log_probs = teacher_forced(&model, &memory, &sequences);
            for (ix, (sequence, log_probs)) in sequences.iter().zip(&log_probs).enumerate() {
                println!("{name}: {:?} {}", sequence.tokens, sequence.score);
                let length = sequence.tokens.len() as f64;
                let want =
                    score(log_probs, sequence) / length.powf(f64::from(settings.length_penalty));
                let got = f64::from(sequence.score);
                assert!((got - want).abs() < 1e-3, "{name}: {got} for {want}");
                differ += usize::from(sequence.tokens != greedy[ix].tokens);
                // Alone the source is written as in the batch.
                let alone = model
                    .encode(&Padded::new(&sources[ix..=ix], 0), false)
                    .unwrap();
                let alone = generate(&model, &alone, &settings);
                assert_eq!(alone[0].tokens, sequence.tokens, "{name}, alone");
            }
        }
    }
    // Else no history would have been taken over.
    println!("{differ} of 24 results are not the greedy ones");
    assert!(differ > 4, "{differ}");
}

#[test]
fn a_step_makes_nothing_and_submits_once() {
    let (_, spec) = specs().swap_remove(0);
    for beams in [1, 4] {
        // An account of its own: the other tests run meanwhile.
        let gpu = gpu().narrowed(gpu().caps().clone());
        let (model, _) = make(&gpu, &spec, DType::F32);
        let sources = Padded::new(&sources(&spec), 0);
        let memory = model.encode(&sources, false).unwrap();
        let settings = settings(beams);
        let mut generator = Generator::new(&model, &memory, &settings).unwrap();
        generator.next().expect("a step").unwrap();
        let mut last = gpu.counters();
        let mut steps = 1;
        for step in generator.by_ref() {
            step.unwrap();
            let now = gpu.counters();
            assert_eq!(now.submits, last.submits + 1, "one submission a step");
            last.submits = now.submits;
            assert_eq!(now, last, "no buffer, bind group or pipeline");
            steps += 1;
        }
        assert_eq!(generator.steps(), steps);
        println!("{beams} beams: {steps} steps, {last:?}");
        assert!(steps > 3);
    }
}
