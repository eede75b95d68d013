//! Drafts, good and bad, in one branch and in several: what is written is the same bits, and only the steps change.

use qkv::generate::{
    Batch, BatchSettings, CausalSettings, DraftCounts, Drafter, Event, ModelDrafter, Ngram,
    Speculative,
};
use qkv::gpu::DType;
use qkv::model::{CausalModel, CausalSpec, RopeScaling};
use qkv::ops::Sampling;

use crate::grid::Random;
use crate::maker::{make, specs};
use crate::{generate, gpu, tokens};

/// Drafts what a function says of the text and the most tokens.
struct Told<F>(F);

impl<F: FnMut(&[u32], usize) -> Vec<Vec<u32>>> Drafter for Told<F> {
    fn draft(&mut self, text: &[u32], most: u32) -> qkv::Result<Vec<Vec<u32>>> {
        Ok((self.0)(text, most as usize))
    }
}

fn told<'f>(f: impl FnMut(&[u32], usize) -> Vec<Vec<u32>> + 'f) -> Box<dyn Drafter + 'f> {
    Box::new(Told(f))
}

/// Tokens with the bits of their log-probabilities.
type Written = Vec<(u32, u32)>;

fn write<'m>(
    model: &'m CausalModel,
    prompt: &[u32],
    settings: &CausalSettings,
    types: [DType; 2],
    drafter: Box<dyn Drafter + 'm>,
) -> (Written, DraftCounts) {
    let mut text = Speculative::new(model, prompt, settings, types, drafter).unwrap();
    let next = |next: qkv::Result<(u32, f32)>| {
        let (token, logprob) = next.unwrap();
        (token, logprob.to_bits())
    };
    let written: Written = text.by_ref().map(next).collect();
    let counts = text.counts();
    assert_eq!(counts.steps + counts.accepted, written.len() as u32);
    assert!(counts.accepted <= counts.drafted);
    (written, counts)
}

/// What is written without drafts.
fn plain(
    model: &CausalModel,
    prompt: &[u32],
    settings: &CausalSettings,
    types: [DType; 2],
) -> Written {
    let none = told(|_: &[u32], _| Vec::new());
    let (written, counts) = write(model, prompt, settings, types, none);
    assert_eq!(counts.steps as usize, written.len());
    written
}

fn ids(written: &Written) -> Vec<u32> {
    written.iter().map(|&(token, _)| token).collect()
}

/// What a batch writes.
fn batch(
    model: &CausalModel,
    prompt: &[u32],
    settings: &CausalSettings,
    types: [DType; 2],
) -> Vec<u32> {
    let sizes = BatchSettings {
        pages: 20,
        page_len: 5,
        types,
        budget: 16,
        max_sequences: 1,
        cascade: false,
    };
    let mut batch = Batch::new(model, sizes).unwrap();
    batch.add(prompt, settings);
    while !batch.is_empty() {
        for event in batch.step().unwrap() {
            if let Event::Finished { sequence, .. } = event {
                return sequence.tokens;
            }
        }
    }
    panic!("it does not end");
}

/// The stacks whose rotary base stays, with room for the prompts.
fn stacks() -> Vec<(&'static str, CausalSpec)> {
    let mut stacks = specs();
    stacks.retain(|(_, spec)| !matches!(spec.rope.scaling, RopeScaling::Dynamic { .. }));
    stacks
        .iter_mut()
        .for_each(|(_, spec)| spec.max_positions = 90);
    stacks
}

/// A token that is not this one.
fn other(token: u32, vocab: u32) -> u32 {
    (token + 1) % vocab
}

#[test]
fn drafts_change_no_bit_of_what_is_written() {
    const NEW: u32 = 24;
    for (name, spec) in stacks() {
        let (model, _) = make(gpu(), &spec, DType::F32);
        let (smaller, _) = {
            let mut spec = spec.clone();
            (spec.layers, spec.windows) = (1, spec.windows[..1].to_vec());
            make(gpu(), &spec, DType::F32)
        };
        let (types, vocab) = ([DType::F32; 2], spec.vocab);
        // At the edges of pages of 16.
        for prompt in tokens(21, &[1, 14, 31], vocab) {
            let settings = CausalSettings::greedy(NEW, Vec::new());
            let want = plain(&model, &prompt, &settings, types);
            let all = [&prompt[..], &ids(&want)].concat();
            assert_eq!(batch(&model, &prompt, &settings, types), ids(&want));
            let alone = generate(&model, std::slice::from_ref(&prompt), &settings);
            assert_eq!(alone[0].tokens, ids(&want), "{name}");

            // The next `n` tokens, of which the one numbered `wrong` is another.
            let next = |text: &[u32], n: usize, wrong: usize| -> Vec<u32> {
                assert_eq!(
                    text,
                    &all[..text.len()],
                    "{name}: only what is written is shown"
                );
                let mut next = all[text.len()..][..n].to_vec();
                if let Some(token) = next.get_mut(wrong) {
                    *token = other(*token, vocab);
                }
                next
            };
            let never = usize::MAX;
            let steps = |each: u32| 1 + (NEW - 1).div_ceil(each);
            let run = |what: &str, drafter: Box<dyn Drafter + '_>| -> DraftCounts {
                let (got, counts) = write(&model, &prompt, &settings, types, drafter);
                assert_eq!(got, want, "{name}, {what}");
                counts
            };

            let good = run("good", told(|t: &[u32], n| vec![next(t, n.min(5), never)]));
            assert_eq!(good.steps, steps(6));
            let bad = run("bad", told(|t: &[u32], n| vec![next(t, n.min(5), 0)]));
            assert_eq!((bad.steps, bad.accepted), (NEW, 0));
            let half = run("half", told(|t: &[u32], n| vec![next(t, n.min(5), 2)]));
            assert_eq!(half.steps, steps(3));
            let empty = run("empty", told(|_: &[u32], _| vec![Vec::new(); 9]));
            assert_eq!(empty.drafted, 0);
            let second = run(
                "the second branch",
                told(|t: &[u32], n| vec![next(t, n.min(7), 0), next(t, n.min(4), never)]),
            );
            assert_eq!(second.steps, steps(5));
            let mut turn = 0;
            let turns = run(
                "either branch",
                told(|t: &[u32], n| {
                    turn += 1;
                    let mut tree = vec![next(t, n.min(3), 0), next(t, n.min(3), never)];
                    if turn % 3 > 0 {
                        tree.reverse();
                    }
                    tree
                }),
            );
            assert_eq!(turns.steps, steps(4));
            let four = run(
                "four branches with a beginning in common",
                told(|t: &[u32], n| {
                    let wrong = [1, 3, 2, 0];
                    wrong.map(|wrong| next(t, n.min(6), wrong)).to_vec()
                }),
            );
            assert_eq!(four.steps, steps(4));
            let mut random = Random::new(22);
            run(
                "random trees",
                told(|t: &[u32], n| {
                    let branches = random.below(5);
                    let mut branch = |_| {
                        let n = random.below(n as u32 + 1) as usize;
                        let wrong = random.below(8) as usize;
                        next(t, n, wrong)
                    };
                    (0..branches).map(&mut branch).collect()
                }),
            );
            run("n-grams", Box::new(Ngram { tokens: 6 }));
            let itself = ModelDrafter::new(&model, 4, 90).unwrap();
            let itself = run("the model itself", Box::new(itself));
            assert_eq!(itself.steps, steps(5));
            let short = ModelDrafter::new(&model, 4, prompt.len() as u32 + 9).unwrap();
            let short = run("the model itself, with less room", Box::new(short));
            assert!((steps(5) + 1..NEW).contains(&short.steps));
            let smaller = ModelDrafter::new(&smaller, 4, 90).unwrap();
            let counts = run("another model", Box::new(smaller));
            println!("{name}: {counts:?} of another model");

            // An end token within what is accepted ends it there.
            let end = want[20].0;
            let at = want.iter().position(|&(token, _)| token == end).unwrap();
            let ends = CausalSettings::greedy(NEW, vec![end]);
            let good = told(|t: &[u32], n| vec![next(t, n.min(7), never)]);
            let (got, _) = write(&model, &prompt, &ends, types, good);
            assert_eq!(got, want[..at + 1], "{name}");
        }
    }
}

#[test]
fn a_repeated_text_takes_few_steps_by_n_grams() {
    let (_, mut spec) = specs().swap_remove(0);
    spec.max_positions = 400;
    let (model, _) = make(gpu(), &spec, DType::F32);
    let settings = CausalSettings::greedy(300, Vec::new());
    let types = [DType::F32; 2];
    let prompt = tokens(23, &[5], spec.vocab).remove(0);
    let want = plain(&model, &prompt, &settings, types);
    let (got, counts) = write(
        &model,
        &prompt,
        &settings,
        types,
        Box::new(Ngram { tokens: 8 }),
    );
    assert_eq!(got, want);
    assert_eq!(generate(&model, &[prompt], &settings)[0].tokens, ids(&want));
    // Small stacks soon write the same again and again.
    println!("{counts:?}");
    assert!(counts.steps < 150);
}

#[test]
fn drafts_change_no_bit_of_caches_of_other_types() {
    let (_, mut spec) = specs().swap_remove(0);
    spec.heads.head_dim = 32;
    spec.max_positions = 90;
    let (model, _) = make(gpu(), &spec, DType::F32);
    let prompt = tokens(24, &[14], spec.vocab).remove(0);
    let settings = CausalSettings::greedy(40, Vec::new());
    for types in [
        [DType::F16; 2],
        [DType::BF16, DType::F32],
        [DType::Q8_0; 2],
        [DType::Q4_0, DType::Q8_0],
    ] {
        if types.contains(&DType::F16) && !gpu().caps().f16 {
            println!("this device has no f16");
            continue;
        }
        let want = plain(&model, &prompt, &settings, types);
        assert_eq!(batch(&model, &prompt, &settings, types), ids(&want));
        let all = [&prompt[..], &ids(&want)].concat();
        let mut turn = 0;
        let tree = |text: &[u32], n: usize| {
            turn += 1;
            let right = all[text.len()..][..n.min(5)].to_vec();
            let wrong = right.iter().map(|&token| other(token, spec.vocab));
            let mut tree = vec![wrong.collect(), right];
            if turn % 3 == 0 {
                tree.reverse();
            }
            tree
        };
        let (got, counts) = write(&model, &prompt, &settings, types, told(tree));
        assert_eq!(got, want, "{types:?}");
        assert_eq!(counts.steps, 1 + 39u32.div_ceil(6));
    }
}

#[test]
fn drafts_that_cannot_be_taken_are_refused_by_name() {
    let (_, spec) = specs().swap_remove(0);
    let (model, _) = make(gpu(), &spec, DType::F32);
    let settings = CausalSettings::greedy(10, Vec::new());
    let types = [DType::F32; 2];
    let nothing = || told(|_: &[u32], _| Vec::new());
    let refused = |model: &CausalModel, prompt: &[u32], settings: &CausalSettings| {
        let made = Speculative::new(model, prompt, settings, types, nothing());
        made.err().expect("a refusal").to_string()
    };
    let drawn = |temperature, repeat_penalty| CausalSettings {
        sampling: Sampling {
            temperature,
            repeat_penalty,
            ..Sampling::GREEDY
        },
        ..settings.clone()
    };
    let (_, grown) = specs().swap_remove(4);
    let (grown, _) = make(gpu(), &grown, DType::F32);
    for (said, word) in [
        (
            refused(&model, &[1], &drawn(0.5, 1.0)),
            "temperature is 0.5",
        ),
        (
            refused(&model, &[1], &drawn(0.0, 1.5)),
            "repeat_penalty is 1.5",
        ),
        (refused(&model, &[], &settings), "empty"),
        (
            refused(&model, &[1; 24], &settings),
            "is 33: the model has 32",
        ),
        (refused(&grown, &[1], &settings), "rotary base"),
        (
            refused(&model, &[1], &CausalSettings::greedy(0, Vec::new())),
            "max_tokens",
        ),
    ] {
        assert!(said.contains(word), "{said}");
    }
    let longest = Speculative::new(&model, &[1; 23], &settings, types, nothing());
    assert_eq!(longest.unwrap().count(), 10);

    // A draft that is refused ends the text with its refusal.
    for (draft, word) in [
        (vec![vec![1]; 5], "branches is 5"),
        (vec![vec![1; 9]], "tokens is 9: at most 8"),
        (vec![vec![37]], "token is 37"),
    ] {
        let mut once = Some(draft);
        let drafter = told(move |text: &[u32], most| {
            assert_eq!(most, 10 - (text.len() - 3) - 1);
            once.take().unwrap()
        });
        let mut text = Speculative::new(&model, &[1, 2, 3], &settings, types, drafter).unwrap();
        assert!(text.next().unwrap().is_ok());
        let said = text.next().unwrap().unwrap_err().to_string();
        assert!(said.contains(word), "{said}");
        assert!(text.next().is_none());
    }
    for tokens in [0, 17] {
        let said = ModelDrafter::new(&model, tokens, 20)
            .err()
            .expect("a refusal");
        assert!(said.to_string().contains("1 to 16"), "{said}");
    }
    let said = ModelDrafter::new(&grown, 4, 10).err().expect("a refusal");
    assert!(said.to_string().contains("rotary base"), "{said}");
}
