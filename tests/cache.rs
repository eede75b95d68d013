//! The paged cache beside a plain list of rows: any sequence of operations, and attention over what is left.

#[path = "support/compare.rs"]
mod compare;
#[path = "support/device.rs"]
mod device;

use compare::tolerance;
use device::gpu;
use proptest::prelude::*;
use qkv::Error;
use qkv::attention::{self, Options, Route, Tensors, View};
use qkv::cache::{Keep, PagedCache, PagedExtents, SequenceId};
use qkv::gpu::{DType, Recorder, Tensor};
use qkv::ops::{self, Append, Rows};
use qkv::reference::{self, Attention};

const KV_HEADS: usize = 2;
const HEADS: usize = 4;
const DIM: usize = 32;
const WIDTH: usize = KV_HEADS * DIM;

/// Numbers in -1 .. 1 that follow from a seed.
fn noise(mut seed: u64, n: usize) -> Vec<f32> {
    let mut next = || {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    next();
    next();
    (0..n).map(|_| next()).collect()
}

/// A position's keys and values follow from all tokens up to it, as in a model. `[2, Hk, D]`
fn content(tokens: &[u32]) -> Vec<f32> {
    let seed = tokens.iter().fold(17u64, |seed, &token| {
        (seed ^ u64::from(token))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(23)
    });
    noise(seed, 2 * WIDTH)
}

/// A cache, and what each of its sequences should hold.
struct Both {
    cache: PagedCache,
    types: [DType; 2],
    sequences: Vec<(SequenceId, Vec<u32>, Keep)>,
}

impl Both {
    fn new(types: [DType; 2], pages: u32, page_len: u32) -> Both {
        let extents = PagedExtents {
            layers: 2,
            pages,
            page_len,
            kv_heads: KV_HEADS as u32,
            head_dim: DIM as u32,
        };
        let cache = PagedCache::new(gpu(), types, extents).unwrap();
        // Whatever no sequence has written is NaN.
        for layer in 0..2 {
            for tensor in cache.layer(layer) {
                let nan = vec![f32::NAN; tensor.len() as usize];
                let poison = gpu()
                    .upload_floats("nan", tensor.dtype(), tensor.shape(), &nan)
                    .unwrap();
                gpu().write(tensor, &gpu().read(&poison).unwrap()).unwrap();
            }
        }
        Both {
            cache,
            types,
            sequences: Vec::new(),
        }
    }

    /// Appends to one sequence, in the cache by one step; false where the pages ran out.
    fn append(&mut self, at: usize, tokens: &[u32]) -> bool {
        let (id, all, _) = &mut self.sequences[at];
        let (id, from) = (*id, all.len());
        let before = (self.cache.free_pages(), self.cache.tables(&[id]).unwrap());
        let mut recorder = Recorder::new(gpu());
        match self.cache.append(&mut recorder, id, tokens) {
            Ok(()) => {}
            Err(Error::OutOfMemory(_)) => {
                let after = self.cache.tables(&[id]).unwrap();
                assert_eq!(before.0, self.cache.free_pages());
                let pages = |tensor| gpu().read_u32(tensor).unwrap();
                assert_eq!(pages(&before.1.pages), pages(&after.pages));
                return false;
            }
            Err(other) => panic!("{other}"),
        }
        all.extend_from_slice(tokens);
        if tokens.is_empty() {
            return true;
        }
        // A query head of zeros, then keys and values.
        let mut qkv = Vec::new();
        let mut places = Vec::new();
        for n in from..all.len() {
            qkv.extend(vec![0.0; HEADS * DIM]);
            qkv.extend(content(&all[..=n]));
            places.extend([0, n as u32]);
        }
        let n = tokens.len() as u32;
        let row = (HEADS * DIM + 2 * WIDTH) as u32;
        let qkv = gpu()
            .upload_floats("qkv", DType::F32, &[n, row], &qkv)
            .unwrap();
        let places = gpu().upload_u32("places", &[n, 2], &places).unwrap();
        let tables = self.cache.tables(&[id]).unwrap();
        for layer in 0..2 {
            let [k, v] = self.cache.layer(layer);
            let step = Append {
                qkv: &qkv,
                heads: HEADS as u32,
                rows: Rows::Places(&places),
                k_cache: k,
                v_cache: v,
                pages: Some(&tables.pages),
                qk_norm: None,
                rotary: None,
                q: None,
            };
            ops::append(&mut recorder, &step).unwrap();
        }
        gpu().run(&recorder.finish().unwrap()).unwrap();
        true
    }

    fn start(&mut self, tokens: &[u32], keep: Keep) -> bool {
        let id = self.cache.start(tokens, keep);
        let has = self.cache.len(id).unwrap() as usize;
        assert!(
            has < tokens.len().max(1) && has.is_multiple_of(self.cache.extents().page_len as usize)
        );
        self.sequences.push((id, tokens[..has].to_vec(), keep));
        self.append(self.sequences.len() - 1, &tokens[has..])
    }

    /// What storage makes of rows of D columns.
    fn stored(dtype: DType, rows: &[f32]) -> Vec<f64> {
        let shape = [(rows.len() / DIM) as u32, DIM as u32];
        let tensor = gpu().upload_floats("rows", dtype, &shape, rows).unwrap();
        let values = gpu().read_floats(&tensor).unwrap();
        values.into_iter().map(f64::from).collect()
    }

    /// Attention of two queries of every sequence over its own keys, each layer, every fused route.
    fn check(&self) {
        if self.sequences.is_empty() {
            return;
        }
        let b = self.sequences.len();
        let ids: Vec<SequenceId> = self.sequences.iter().map(|(id, ..)| *id).collect();
        let tables = self.cache.tables(&ids).unwrap();
        let shape = [b as u32, HEADS as u32, 2, DIM as u32];
        let queries = noise(5, b * HEADS * 2 * DIM);
        let q = gpu()
            .upload_floats("q", DType::F32, &shape, &queries)
            .unwrap();
        let prefix: Vec<u32> = self
            .sequences
            .iter()
            .map(|(_, _, keep)| keep.first)
            .collect();
        let prefix = gpu().upload_u32("prefix", &[b as u32], &prefix).unwrap();
        // One window serves all: that of the sequence that keeps least.
        let window = self
            .sequences
            .iter()
            .filter_map(|(_, _, keep)| keep.window)
            .min();
        let run = |layer: usize, route: Route| -> Vec<f32> {
            let out: Tensor = gpu().empty("out", DType::F32, &shape).unwrap();
            let view = |tensor| View::bhld(tensor).unwrap();
            let [k, v] = self.cache.layer(layer);
            let tensors = Tensors {
                pages: Some(&tables.pages),
                kv_len: Some(&tables.lengths),
                prefix_len: Some(&prefix),
                ..Tensors::new(view(&q), view(k), view(v), view(&out))
            };
            let options = Options {
                causal: true,
                window: [window.map(|n| n - 1), None],
                route: Some(route),
                ..Options::default()
            };
            let mut recorder = Recorder::new(gpu());
            attention::record(&mut recorder, &tensors, &options).unwrap();
            gpu().run(&recorder.finish().unwrap()).unwrap();
            gpu().read_floats(&out).unwrap()
        };
        let mut want = Vec::new();
        for (b, (_, tokens, keep)) in self.sequences.iter().enumerate() {
            let n = tokens.len();
            let rows: Vec<Vec<f32>> = (0..n).map(|at| content(&tokens[..=at])).collect();
            let part = |part: usize| -> Vec<f32> {
                let heads = (0..KV_HEADS).map(|h| part * WIDTH + h * DIM);
                heads
                    .flat_map(|at| rows.iter().flat_map(move |row| row[at..at + DIM].to_vec()))
                    .collect()
            };
            let k = Both::stored(self.types[0], &part(0));
            let v = Both::stored(self.types[1], &part(1));
            let own: Vec<f64> = queries[b * HEADS * 2 * DIM..][..HEADS * 2 * DIM]
                .iter()
                .map(|&x| f64::from(x))
                .collect();
            let mask = reference::expand([1, HEADS, 2, n], |_, _, i, j| {
                let position = i as i64 + n as i64 - 2;
                let near = window.is_none_or(|window| j as i64 > position - i64::from(window));
                j < keep.first as usize || (j as i64 <= position && near)
            });
            let mut problem =
                Attention::new([1, HEADS, 2, DIM], [1, KV_HEADS, n, DIM], &own, &k, &v);
            problem.mask = Some(&mask);
            want.extend(reference::attention(&problem).out);
        }
        // The kernel's rounding of a quant may fall to the other side than the host's.
        let slack = match self.types.iter().any(|t| t.is_quantized()) {
            true => 40.0,
            false => 1.0,
        };
        for layer in 0..2 {
            for route in [Route::Prefill, Route::Decode] {
                let got = run(layer, route);
                compare::compare_rows(
                    "attention",
                    &got,
                    &want,
                    DIM,
                    tolerance("f32", 64).times(slack),
                )
                .unwrap_or_else(|e| panic!("{route:?}: {e}"));
            }
        }
    }

    /// Every page is held or free, and what is held is counted once.
    fn balance(&self) {
        let page = self.cache.bytes() / u64::from(self.cache.extents().pages);
        let held = self.cache.extents().pages - self.cache.free_pages();
        assert_eq!(self.cache.used_bytes(), page * u64::from(held));
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Start(usize, u32),
    Append(usize, usize),
    Truncate(usize, usize),
    Fork(usize),
    Remove(usize),
    SaveAndRestore(usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::*;
    prop_oneof![
        3 => (0usize..40, 0u32..2).prop_map(|(n, text)| Start(n, text)),
        4 => (any::<usize>(), 0usize..20).prop_map(|(at, n)| Append(at, n)),
        2 => (any::<usize>(), any::<usize>()).prop_map(|(at, n)| Truncate(at, n)),
        2 => any::<usize>().prop_map(Fork),
        1 => any::<usize>().prop_map(Remove),
        1 => any::<usize>().prop_map(SaveAndRestore),
    ]
}

fn storages() -> Vec<[DType; 2]> {
    use DType::{BF16, F16, F32, Q4_0, Q8_0};
    let mut all = vec![[F32, F32], [Q8_0, Q4_0], [BF16, Q8_0]];
    if gpu().caps().f16 {
        all.push([F16, F32]);
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_operations_leave_what_a_plain_list_holds(
        page_len in prop_oneof![Just(1u32), Just(5), Just(16)],
        storage in 0usize..4,
        operations in proptest::collection::vec(operation(), 1..16),
    ) {
        let storages = storages();
        let mut both = Both::new(storages[storage % storages.len()], 240 / page_len, page_len);
        let mut counter = 1000;
        for operation in operations {
            let n = both.sequences.len();
            match operation {
                Operation::Start(n, text) => {
                    // Two texts that begin alike, so that pages are found.
                    let tokens: Vec<u32> = (0..n as u32).map(|at| at.min(20) + text * (at / 24)).collect();
                    if !both.start(&tokens, Keep::default()) {
                        let (id, ..) = both.sequences.pop().unwrap();
                        both.cache.remove(id).unwrap();
                    }
                }
                _ if n == 0 => {}
                Operation::Append(at, n_tokens) => {
                    let tokens: Vec<u32> = (0..n_tokens as u32).map(|t| counter + t).collect();
                    counter += 100;
                    both.append(at % n, &tokens);
                }
                Operation::Truncate(at, len) => {
                    let (id, tokens, _) = &mut both.sequences[at % n];
                    let len = len % (tokens.len() + 1);
                    both.cache.truncate(*id, len as u32).unwrap();
                    tokens.truncate(len);
                    prop_assert!(both.cache.truncate(*id, len as u32 + 1).is_err());
                }
                Operation::Fork(at) => {
                    let (id, tokens, keep) = both.sequences[at % n].clone();
                    let fork = both.cache.fork(id).unwrap();
                    both.sequences.push((fork, tokens, keep));
                }
                Operation::Remove(at) => {
                    let (id, ..) = both.sequences.swap_remove(at % n);
                    both.cache.remove(id).unwrap();
                    prop_assert!(both.cache.len(id).is_err());
                }
                Operation::SaveAndRestore(at) => {
                    let folder = tempfile::tempdir().unwrap();
                    let path = folder.path().join("sequence");
                    let (id, tokens, keep) = both.sequences[at % n].clone();
                    both.cache.save(id, "a model", &path).unwrap();
                    prop_assert!(both.cache.restore("another", &path).is_err());
                    match both.cache.restore("a model", &path) {
                        Ok(id) => both.sequences.push((id, tokens, keep)),
                        Err(Error::OutOfMemory(_)) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            }
            both.balance();
            for (id, tokens, _) in &both.sequences {
                prop_assert_eq!(both.cache.tokens(*id).unwrap(), &tokens[..]);
            }
        }
        both.check();
        for (id, ..) in both.sequences.drain(..) {
            both.cache.remove(id).unwrap();
        }
        prop_assert_eq!(both.cache.used_bytes(), 0);
    }
}

#[test]
fn sequences_that_begin_alike_share_pages() {
    let mut both = Both::new([DType::F32; 2], 20, 5);
    let text: Vec<u32> = (0..23).collect();
    assert!(both.start(&text, Keep::default()));
    assert_eq!(both.cache.free_pages(), 15);
    // Four whole pages are shared, the fifth is its own.
    assert!(both.start(&text, Keep::default()));
    assert_eq!(both.cache.free_pages(), 14);
    // Twenty tokens: the last one is computed, so three pages are shared.
    assert!(both.start(&text[..20], Keep::default()));
    assert_eq!(both.cache.free_pages(), 13);
    let other: Vec<u32> = (0..7).chain(90..99).collect();
    assert!(both.start(&other, Keep::default()));
    assert_eq!(both.cache.free_pages(), 10);
    both.check();
    // One that goes on writes to no page of the others.
    for at in 0..4 {
        assert!(both.append(at, &[7, 7, 7]));
    }
    both.check();
}

#[test]
fn a_page_that_is_written_anew_is_no_longer_found() {
    let mut both = Both::new([DType::F32; 2], 20, 5);
    let text: Vec<u32> = (0..12).collect();
    assert!(both.start(&text, Keep::default()));
    let (id, tokens, _) = &mut both.sequences[0];
    both.cache.truncate(*id, 7).unwrap();
    tokens.truncate(7);
    assert!(both.append(0, &[90, 91, 92, 93]));
    assert!(both.start(&text, Keep::default()));
    // The first page is shared; the second holds something else by now.
    assert_eq!(both.cache.free_pages(), 20 - 3 - 2);
    both.check();
}

#[test]
fn a_window_keeps_its_keys_and_the_first_ones() {
    for page_len in [1, 4, 16] {
        let mut both = Both::new([DType::F32; 2], 160 / page_len, page_len);
        let keep = Keep {
            window: Some(33),
            first: 3,
        };
        assert!(both.start(&[1, 2, 3], keep));
        let mut most = 0;
        for n in 0..70u32 {
            assert!(both.append(0, &[n, n + 1, n + 2]), "{n}");
            most = most.max(160 / page_len - both.cache.free_pages());
            if n % 23 == 0 {
                both.check();
            }
        }
        both.check();
        // The window, what is left of its first page, a step, and the first positions.
        let bound = (33 + 3) / page_len + 2 + 3u32.div_ceil(page_len);
        assert!(most <= bound, "{most} pages of {page_len}, {bound} at most");
        let id = both.sequences[0].0;
        let said = both.cache.truncate(id, 100).unwrap_err().to_string();
        assert!(said.contains("still kept"), "{said}");
        both.cache.truncate(id, 212).unwrap();
        both.sequences[0].1.truncate(212);
        both.check();
    }
}

#[test]
fn many_sequences_of_all_lengths() {
    let mut both = Both::new([DType::F32; 2], 160, 256);
    let lens = (0..64u32).map(|n| if n == 63 { 4096 } else { n * n / 3 });
    let mut held = 0;
    for (n, len) in lens.enumerate() {
        let tokens: Vec<u32> = (0..len).map(|t| t * 64 + n as u32).collect();
        assert!(both.start(&tokens, Keep::default()), "{n}");
        held += len.div_ceil(256);
    }
    assert_eq!(both.cache.free_pages(), 160 - held);
    both.check();
    // Too much for what is left: an error for this one, and the others are as they were.
    let more = vec![1; 256 * 100];
    assert!(!both.append(5, &more));
    both.check();
}

#[test]
fn caches_that_cannot_be_are_refused() {
    let good = PagedExtents {
        layers: 1,
        pages: 4,
        page_len: 4,
        kv_heads: 2,
        head_dim: 32,
    };
    let said = |types, extents| {
        let made = PagedCache::new(gpu(), types, extents);
        made.err().map(|e| e.to_string()).unwrap_or_default()
    };
    for (name, extents) in [
        (
            "page_len",
            PagedExtents {
                page_len: 0,
                ..good
            },
        ),
        ("pages", PagedExtents { pages: 0, ..good }),
        ("layers", PagedExtents { layers: 0, ..good }),
        (
            "kv_heads",
            PagedExtents {
                kv_heads: 0,
                ..good
            },
        ),
        (
            "head_dim",
            PagedExtents {
                head_dim: 0,
                ..good
            },
        ),
    ] {
        assert!(said([DType::F32; 2], extents).starts_with(name), "{name}");
    }
    let odd = PagedExtents {
        head_dim: 48,
        ..good
    };
    assert!(said([DType::Q8_0, DType::F32], odd).contains("blocks of 32"));
    assert!(said([DType::U32; 2], good).contains("storage"));
    assert_eq!(said([DType::Q4_0; 2], good), "");
}
