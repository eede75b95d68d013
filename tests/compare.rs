//! The harness that judges every kernel is itself fed wrong answers, and must object to each.

#[path = "support/compare.rs"]
mod compare;

use compare::{
    FINITE_16, FINITE_32, NAN_16, NAN_32, Tolerance, beside_plain, compare_rows, round_bf16,
    round_f16, round_to, tolerance,
};

const ROWS: usize = 4000;
const ROW_LEN: usize = 24;

/// Outputs as attention makes them, no two rows alike, `[ROWS, ROW_LEN]`.
fn want() -> Vec<f64> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..ROWS * ROW_LEN).map(next).collect()
}

fn right(storage: &str) -> Vec<f32> {
    want()
        .iter()
        .map(|&x| round_to(storage, x) as f32)
        .collect()
}

/// What the harness says of `got`, for every storage type it must be against.
#[track_caller]
fn objects_to(got: &[f32], words: &[&str]) {
    for storage in ["f32", "f16", "bf16"] {
        let said = compare_rows("out", got, &want(), ROW_LEN, tolerance(storage, 4096));
        let said = said.expect_err("an objection");
        for word in words {
            assert!(said.contains(word), "{word:?} is not in {said:?}");
        }
    }
}

#[test]
fn the_right_answer_is_accepted() {
    for (storage, at_least) in [("f32", 0.0), ("f16", 0.2), ("bf16", 0.2)] {
        let got = right(storage);
        let ratio = compare_rows("out", &got, &want(), ROW_LEN, tolerance(storage, 64)).unwrap();
        // The rounding of the output alone is half of what is allowed.
        assert!(ratio > at_least && ratio <= 0.5, "{storage}: {ratio}");
    }
    assert_eq!(
        compare_rows("out", &[], &[], ROW_LEN, tolerance("f32", 1)),
        Ok(0.0)
    );
}

#[test]
fn a_wider_type_than_promised_is_needed() {
    // What bf16 makes of the answer is no f16 answer, nor is f16's an f32 answer.
    for (stored, promised) in [("bf16", "f16"), ("f16", "f32")] {
        let tol = tolerance(promised, 64);
        assert!(compare_rows("out", &right(stored), &want(), ROW_LEN, tol).is_err());
    }
}

#[test]
fn a_swapped_row_is_seen() {
    let mut got = right("f32");
    let (left, other) = got.split_at_mut(2001 * ROW_LEN);
    left[2000 * ROW_LEN..].swap_with_slice(&mut other[..ROW_LEN]);
    objects_to(&got, &["2 of 4000 rows", "first row 2000 ", "out: "]);
}

#[test]
fn one_nan_is_seen() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, NAN_32.f32()] {
        let mut got = right("f32");
        got[17 * ROW_LEN + 5] = bad;
        objects_to(&got, &["1 of 4000 rows", "first row 17 column 5"]);
    }
}

#[test]
fn a_zeroed_tail_is_seen() {
    let mut got = right("f32");
    got[ROWS * ROW_LEN - 7..].fill(0.0);
    objects_to(&got, &["1 of 4000 rows", "first row 3999"]);
    let mut got = right("f32");
    got[3000 * ROW_LEN..].fill(0.0);
    objects_to(&got, &["1000 of 4000 rows", "first row 3000"]);
}

#[test]
fn an_untouched_output_is_seen() {
    for canary in [NAN_32, FINITE_32] {
        let got = canary.frame_f32(0, ROWS * ROW_LEN, 0);
        objects_to(&got, &["4000 of 4000 rows", "first row 0"]);
        assert!(canary.check_f32("out", &got, 0..got.len()).is_err());
    }
    objects_to(&vec![0.0; ROWS * ROW_LEN], &["4000 of 4000 rows"]);
}

#[test]
fn a_wrong_length_is_seen() {
    let got = right("f32");
    objects_to(&got[..got.len() - 1], &["95999 values", "96000"]);
    objects_to(&got[..got.len() - ROW_LEN], &["95976 values"]);
    objects_to(&[], &["0 values"]);
    for row_len in [0, ROW_LEN - 1] {
        let said = compare_rows("out", &got, &want(), row_len, tolerance("f32", 1));
        assert!(said.unwrap_err().contains("are not rows of"));
    }
}

#[test]
fn a_shift_by_one_is_seen() {
    let mut got = right("f32");
    got.rotate_right(1);
    objects_to(&got, &["4000 of 4000 rows"]);
    // Within one row only.
    let mut got = right("f32");
    got[40 * ROW_LEN..][..ROW_LEN].rotate_left(1);
    objects_to(&got, &["1 of 4000 rows", "first row 40 "]);
}

#[test]
fn the_worst_row_is_named_beside_the_first() {
    let mut got = right("f32");
    got[3 * ROW_LEN] += 0.5;
    got[9 * ROW_LEN + 2] -= 100.0;
    objects_to(
        &got,
        &["2 of 4000", "first row 3 column 0", "worst row 9 column 2"],
    );
}

#[test]
fn an_error_is_measured_against_its_own_row() {
    // Too much for the small row, beside a large one and in the same matrix.
    let tol = Tolerance {
        atol: 0.0,
        rtol: 1e-3,
    };
    let want = [1000.0, 500.0, 0.001, 0.002];
    assert!(compare_rows("x", &[1000.5, 499.5, 0.001, 0.002], &want, 2, tol).is_ok());
    assert!(compare_rows("x", &[1000.0, 500.0, 0.001, 0.0021], &want, 2, tol).is_err());
    assert!(compare_rows("x", &[1001.1, 500.0, 0.001, 0.002], &want, 2, tol).is_err());
    // No tolerance at all: only the same value will do.
    assert_eq!(
        compare_rows("x", &[1.0, 2.0], &[1.0, 2.0], 2, tol.times(0.0)),
        Ok(0.0)
    );
    assert!(compare_rows("x", &[1.0, 2.000_001], &[1.0, 2.0], 2, tol.times(0.0)).is_err());
    assert!(compare_rows("x", &[1e-30], &[0.0], 1, tol).is_err());
}

#[test]
fn an_infinite_lse_must_be_the_same_infinity() {
    let tol = tolerance("f32", 8);
    let (plus, minus) = (f64::INFINITY, f64::NEG_INFINITY);
    let check = |got: f32, want: f64| compare_rows("lse", &[1.0, got], &[1.0, want], 1, tol);
    assert_eq!(check(f32::NEG_INFINITY, minus), Ok(0.0));
    assert_eq!(check(f32::INFINITY, plus), Ok(0.0));
    assert!(check(f32::INFINITY, minus).is_err());
    assert!(check(-1e38, minus).is_err());
    assert!(check(f32::NAN, minus).is_err());
    assert!(check(f32::NEG_INFINITY, -1e38).is_err());
    // An oracle that has NaN proves nothing.
    assert!(check(f32::NAN, f64::NAN).is_err());
    assert!(check(1.0, f64::NAN).is_err());
    // An infinity does not widen what its row allows.
    let want = [minus, 1.0];
    let row = |second| compare_rows("row", &[f32::NEG_INFINITY, second], &want, 2, tol);
    assert!(row(1.0).is_ok() && row(1.1).is_err());
}

#[test]
fn canaries_see_a_write_outside_and_a_cell_left_out() {
    for canary in [NAN_32, FINITE_32] {
        let mut cells = canary.frame_f32(3, 10, 4);
        cells[3..13].fill(0.25);
        assert_eq!(canary.check_f32("out", &cells, 3..13), Ok(&[0.25; 10][..]));
        for at in [0, 2, 13, 16] {
            for value in [0.0, 0.25, f32::NAN, -f32::NAN] {
                let mut cells = cells.clone();
                cells[at] = value;
                let said = canary.check_f32("out", &cells, 3..13).unwrap_err();
                assert!(said.contains(&format!("cell {at},")), "{said}");
            }
        }
        for at in [3, 7, 12] {
            let mut cells = cells.clone();
            cells[at] = canary.f32();
            let said = canary.check_f32("out", &cells, 3..13).unwrap_err();
            assert!(said.contains(&format!("the first is {at}")), "{said}");
        }
        assert!(canary.check_f32("out", &cells, 3..18).is_err());
    }
    for canary in [NAN_16, FINITE_16] {
        let mut cells = canary.frame(1, 2, 1);
        assert!(canary.untouched_outside("out", &cells, 1..3).is_ok());
        assert!(canary.written_inside("out", &cells, 1..3).is_err());
        cells[1..].fill(0);
        assert!(canary.untouched_outside("out", &cells, 1..3).is_err());
        assert!(canary.written_inside("out", &cells, 1..3).is_ok());
    }
}

#[test]
fn canaries_are_what_they_say() {
    assert!(NAN_32.f32().is_nan() && FINITE_32.f32().is_finite());
    assert_ne!(NAN_32.0, f32::NAN.to_bits());
    assert!(f16_value(NAN_16.0).is_nan() && bf16_value(NAN_16.0).is_nan());
    assert!(f16_value(FINITE_16.0).is_finite() && bf16_value(FINITE_16.0).is_finite());
}

/// The value of an f16's bits, by the definition of the format.
fn f16_value(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    sign * match exponent {
        0 => fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + fraction) * 2f64.powi(exponent - 25),
    }
}

/// The value of a bf16's bits: the upper half of an f32.
fn bf16_value(bits: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(bits) << 16))
}

#[test]
fn every_16_bit_value_and_every_tie_rounds_as_it_must() {
    type Case = (fn(u16) -> f64, fn(f64) -> f64, u16);
    let cases: [Case; 2] = [
        (f16_value, round_f16, 0x7c00),
        (bf16_value, round_bf16, 0x7f80),
    ];
    for (value, round, infinity) in cases {
        for bits in 0..infinity {
            let low = value(bits);
            // Past the largest stands what would be the next number, were there one.
            let high = match bits + 1 == infinity {
                true => low + (low - value(bits - 1)),
                false => value(bits + 1),
            };
            let next = value(bits + 1);
            let tie = (low + high) / 2.0;
            let even = if bits % 2 == 0 { low } else { next };
            for sign in [1.0, -1.0] {
                let same = |x: f64, y: f64| (sign * x).to_bits() == (sign * y).to_bits();
                assert!(same(sign * round(sign * low), low), "{bits:#x}");
                assert!(same(sign * round(sign * tie), even), "tie after {bits:#x}");
                assert_eq!(round(sign * tie.next_down()), sign * low, "{bits:#x}");
                assert_eq!(round(sign * tie.next_up()), sign * next, "{bits:#x}");
            }
        }
        assert!(round(f64::NAN).is_nan());
        assert_eq!(round(f64::NEG_INFINITY), f64::NEG_INFINITY);
        assert_eq!(round(1e300), f64::INFINITY);
        assert_eq!(round(-0.0).to_bits(), (-0.0f64).to_bits());
        assert_eq!(round(f64::MIN_POSITIVE / 2.0), 0.0);
    }
}

#[test]
fn longer_sums_are_allowed_more() {
    let at = |len| tolerance("f32", len);
    assert_eq!(at(1), at(1024));
    assert!(at(131_072).atol > 10.0 * at(64).atol && at(131_072).atol < 3e-5);
    // At most twice the rounding of the output, for ordinary lengths.
    assert!(tolerance("f16", 1024).rtol < 1.03 * 2f64.powi(-10));
    assert!(tolerance("bf16", 1024).rtol < 1.01 * 2f64.powi(-7));
}

#[test]
fn errors_beyond_twice_the_plain_ones_are_objected_to() {
    let want = want();
    // A plain computation that is off by a hundredth of a row's largest value, at most one.
    let plain: Vec<f64> = want.iter().map(|x| x + 0.01).collect();
    let off = |by: f64| -> Vec<f32> { want.iter().map(|x| (x + by) as f32).collect() };
    for storage in ["f16", "bf16"] {
        let held = |got: &[f32]| beside_plain("out", storage, got, &plain, &want, ROW_LEN);
        let ratio = held(&off(-0.02)).unwrap();
        assert!((ratio - 2.0).abs() < 1e-3, "{ratio}");
        assert!(held(&off(0.0)).unwrap() < 1e-3);
        let rounding = if storage == "f16" { 0.0005 } else { 0.004 };
        assert!(held(&off(0.0201 + rounding)).is_err());
        // One value of one row, and one that is no number.
        for wrong in [0.05, f32::NAN] {
            let mut got = off(0.0);
            got[ROW_LEN * 17 + 3] += wrong;
            let said = held(&got).unwrap_err();
            assert!(said.contains("row 17 is off by"), "{said}");
        }
        let mut overflowing = plain.clone();
        overflowing[ROW_LEN * 17] = f64::NAN;
        let mut got = off(0.0);
        got[ROW_LEN * 17 + 3] += 0.05;
        assert!(beside_plain("out", storage, &got, &overflowing, &want, ROW_LEN).is_ok());
    }
    let zeros = [0.0; 2];
    assert_eq!(
        beside_plain("out", "f16", &[0.0; 2], &zeros, &zeros, 2),
        Ok(0.0)
    );
}
