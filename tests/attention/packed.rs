//! Options that need more buffers than a kernel may bind: small tables packed into one.

use grid::Function;

use qkv::gpu::templates;

use super::*;

/// What browsers grant.
const LEAST: u32 = 8;

/// Every set of options by the buffers it needs, on every route, where a kernel may bind eight.
#[test]
fn nearly_every_set_of_options_fits_eight_buffers() {
    let tensor = |dtype, shape: &[u32]| gpu().empty("tensor", dtype, shape).unwrap();
    let input = tensor(F32, &[1 << 16]);
    let out = tensor(F32, &[2, 4, 70, 8]);
    let lse = tensor(F32, &[2, 4, 70]);
    let per_head = tensor(F32, &[4]);
    let table = tensor(F32, &[8, 4]);
    let integers = tensor(DType::U32, &[2]);
    let offsets = tensor(DType::I32, &[2]);
    let rows = tensor(DType::U32, &[2, 90]);
    let pages = tensor(DType::U32, &[2, 1]);
    let cu = tensor(DType::U32, &[3]);
    let bias = tensor(F32, &[1, 1, 1, 90]);
    let mask = tensor(DType::Bool, &[1, 1, 1, 90]);
    let score =
        "fn score_mod(s: f32, b: u32, h: u32, q: u32, k: u32) -> f32 { return s + first[h]; }";
    let allow = "fn mask_mod(b: u32, h: u32, q: u32, k: u32) -> bool { return second[k] > 0.0; }";
    let mut caps = plans::caps();
    caps.storage_buffers = LEAST;
    // Plain, lengths, ragged, histories, pages.
    let mut fit = [0; 4];
    let (mut sets, mut shaders) = (0, HashSet::new());
    for keys in 0..5 {
        for set in 0..1 << 10 {
            let has = |bit: u32| set >> bit & 1 == 1;
            let b = if keys == 2 { 1 } else { 2 };
            let view = |tensor, h, l, d| View::new(tensor, [b, h, l, d], 0, [0, 0, 0]).unwrap();
            let (out, lse) = match keys {
                2 => (&tensor(F32, &[1, 4, 70, 8]), &tensor(F32, &[1, 4, 70])),
                _ => (&out, &lse),
            };
            let cells = [2, 4, 70, 90];
            let mut tensors = Tensors::new(
                view(&input, 4, 70, 16),
                view(&input, 2, 90, 16),
                view(&input, 2, 90, 8),
                View::bhld(out).unwrap(),
            );
            match keys {
                1 => tensors.kv_len = Some(&integers),
                2 => (tensors.cu_q, tensors.cu_k) = (Some(&cu), Some(&cu)),
                3 => tensors.rows = Some(&rows),
                4 => tensors.pages = Some(&pages),
                _ => {}
            }
            tensors.q_offset = has(0).then_some(&offsets);
            tensors.prefix_len = has(1).then_some(&integers);
            tensors.alibi = has(2).then_some(&per_head);
            tensors.t5 = has(3).then_some(&table);
            tensors.sinks = has(4).then_some(&per_head);
            tensors.bias = has(5).then(|| View::broadcast(&bias, cells).unwrap());
            tensors.mask = has(6).then(|| View::broadcast(&mask, cells).unwrap());
            tensors.lse = has(7).then_some(lse);
            let t5 = T5 {
                bidirectional: true,
                max_distance: 20,
            };
            let mut options = Options {
                t5: has(3).then_some(t5),
                score_mod: has(8).then(|| score.into()),
                mask_mod: has(9).then(|| allow.into()),
                ..Options::default()
            };
            for (bit, name) in [(8, "first"), (9, "second")] {
                if has(bit) {
                    tensors.extra.push((name, &per_head));
                }
            }
            sets += 1;
            for (ix, route) in Route::ALL.map(Some).into_iter().chain([None]).enumerate() {
                options.route = route;
                match plan(&Problem::new(&tensors, &options).unwrap(), &caps) {
                    Ok(plan) => {
                        fit[ix] += 1;
                        if set % 37 == 0 {
                            shaders.extend(plan.launches.into_iter().map(|one| one.shader));
                        }
                    }
                    Err(Error::Refused { argument, .. }) => {
                        assert_eq!(argument, "the tensors of these options together");
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
    }
    // Some of the texts: what they declare is what they bind.
    for shader in &shaders {
        let text = shader.expand(&templates()).unwrap();
        let bound = text.matches("var<storage").count();
        assert!(bound <= LEAST as usize, "{shader:?} binds {bound}");
    }
    println!("{} kernels", shaders.len());
    println!("of {sets} sets fit {fit:?}");
    // What fits no fused route takes the three passes where the plan may choose.
    assert_eq!((sets, fit), (5120, [5120, 4165, 4165, 5120]));
}

/// The same numbers from tables that are bound and from those that are packed, to the bit, and the oracle's.
#[test]
fn packed_tables_change_no_bit() {
    let sound = |len| Case::new([2, 2], [4, 2], len, [12, 20]);
    let options: [fn(&mut Case); 13] = [
        |case| case.causal = Some(Align::BottomRight),
        |case| case.kv_len = case.ragged.is_none().then(|| lengths(4, case.len[1])),
        |case| case.q_offset = Some(vec![-3, 20]),
        |case| case.prefix = Some(vec![7, 0]),
        |case| {
            let [q, k] = case.len;
            case.kv_len = None;
            case.ragged = Some([vec![q - 2, 2], vec![3, k - 3]]);
        },
        |case| case.histories = case.ragged.is_none(),
        |case| case.page = (!case.histories).then_some(10),
        |case| case.bias = Some([true, true, false, true]),
        |case| case.mask = Some([true; 4]),
        |case| case.alibi = true,
        |case| {
            case.t5 = Some(T5 {
                bidirectional: true,
                max_distance: 20,
            })
        },
        |case| case.sinks = true,
        |case| case.function = Some(Function::Documents),
    ];
    let mut random = grid::Random::new(11);
    let (mut packed, mut runs) = (0, 0);
    for seed in 0..20 {
        // Half of the options each time, so that most sets need more than eight buffers.
        let mut case = sound([[70, 150], [35, 70], [3, 90]][seed % 3]);
        for change in options {
            if random.below(2) == 0 {
                change(&mut case);
            }
        }
        let caps = match seed % 4 {
            0 => gpu().caps().clone(),
            1 => teams_in_subgroups(),
            2 => gpu().caps().without_subgroups(),
            _ => gpu().caps().browser(),
        };
        let with = |storage_buffers| {
            gpu().narrowed(Caps {
                storage_buffers,
                ..caps.clone()
            })
        };
        // On fewer yet, tables are packed in every kernel.
        let (many, least) = (with(32), [LEAST, 7, 6][seed / 4 % 3]);
        let mut prepared = Prepared::new(&many, &case, seed as u64);
        for (route, splits) in [
            (Route::ThreePass, None),
            (Route::Prefill, None),
            (Route::Decode, None),
            (Route::Decode, Some(2)),
        ] {
            prepared = prepared.on(&many);
            let bound = prepared.run(Some(route), splits, None).unwrap();
            assert!(kernels(&bound.plan).all(|kernel| kernel != "pack"));
            prepared = prepared.on(&with(least));
            match prepared.run(Some(route), splits, None) {
                Ok(got) => {
                    packed += usize::from(kernels(&got.plan).any(|kernel| kernel == "pack"));
                    assert_eq!((&got.out, &got.lse), (&bound.out, &bound.lse), "{case:?}");
                    runs += 1;
                }
                Err(said) => assert!(
                    said.contains("the tensors of these options together"),
                    "{said}"
                ),
            }
        }
    }
    println!("{runs} runs, {packed} of them with packed tables");
    assert_eq!((runs, packed), (51, 44));
}

fn kernels(plan: &Plan) -> impl Iterator<Item = &'static str> {
    plan.launches.iter().map(|launch| launch.shader.kernel)
}
