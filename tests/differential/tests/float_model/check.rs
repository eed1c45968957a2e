//! A run: random cases of every form, the interpreter's outcome against the model's.

use crate::forms::{self, Unit};
use crate::{cases, place, vector, x87};
use differential::compare::decode;
use differential::forms::Form;
use differential::interpreted;
use differential::layout::WINDOW;
use differential::native::Native;
use differential::state::{Case, Outcome, Raised};
use differential::values::Random;
use iced_x86::Mnemonic as M;
use std::collections::BTreeMap;
use std::env;
use std::fmt::Write;

/// Cases of a form in the test tier and in a campaign.
const CASES: usize = 250;
const CAMPAIGN_CASES: usize = 10_000;
/// The test tier's seed.
const SEED: u64 = 1;

/// What the model says, and what the manuals leave open.
#[derive(Clone, Debug)]
pub struct Expected {
    pub outcome: Outcome,
    /// If there are any: encodings of which ST(0) may be each.
    pub choices: Vec<u128>,
    /// If there are any: NaNs of which a lane may be each, and the lane's bytes.
    pub nans: (usize, Vec<u64>),
    /// Bits of the x87 status word and of RFLAGS that mean nothing.
    pub open_status: u16,
    pub open_flags: u64,
    /// Bits of MXCSR on which processors and the manual differ.
    pub open_mxcsr: u32,
}

impl Expected {
    /// One outcome.
    pub fn one(outcome: Outcome) -> Self {
        Self {
            outcome,
            choices: Vec::new(),
            nans: (8, Vec::new()),
            open_status: 0,
            open_flags: 0,
            open_mxcsr: 0,
        }
    }
}

fn setting(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

/// Runs all forms of `unit`; panics if some fail.
pub fn run(unit: Unit) {
    let campaign = env::var_os("BEDPLATE_CAMPAIGN").is_some();
    let clock = || std::time::UNIX_EPOCH.elapsed().map_or(SEED, |d| d.as_secs());
    let seed = setting("BEDPLATE_SEED").unwrap_or_else(|| if campaign { clock() } else { SEED });
    let cases = if campaign { CAMPAIGN_CASES } else { CASES };
    let cases = setting("BEDPLATE_CASES").map_or(cases, |n| n as usize);
    let filter = env::var("BEDPLATE_FORMS").unwrap_or_default();

    let mut host = Host(None);
    let (mut count, mut left_out, mut failures) = (0, BTreeMap::<_, Vec<String>>::new(), Vec::new());
    for form in forms::of(unit) {
        let name = format!("{:?}", form.code);
        if let Some(reason) = forms::reason_to_leave_out(unit, form.code) {
            left_out.entry(reason).or_default().push(name);
        } else if name.contains(&filter) {
            count += 1;
            failures.extend(check_form(unit, form, seed, cases, &mut host));
        }
    }
    for (reason, names) in left_out {
        println!("left out ({reason}): {}", names.join(" "));
    }
    println!("{unit:?}: seed {seed}, {count} forms, {cases} cases each; {} forms fail", failures.len());
    assert!(count > 0, "no form is called like {filter:?}");
    assert!(failures.is_empty(), "seed {seed}: {} forms fail:\n{}", failures.len(), failures.join("\n"));
}

/// Runs the cases of a form: how many failed and the first failure, on one line.
fn check_form(unit: Unit, form: Form, seed: u64, count: usize, host: &mut Host) -> Option<String> {
    let of_host = env::var_os("BEDPLATE_HOST").is_some();
    // A form's cases do not depend on which other forms run.
    let mut random = Random::new(seed ^ (form.code as u64).wrapping_mul(0x2545_F491_4F6C_DD1D));
    let (mut failed, mut first) = (0, None);
    for _ in 0..count {
        let case = match cases::random(unit, form, &mut random) {
            Some(case) => case,
            None => return Some(format!("{:?}: no case found", form.code)),
        };
        let ours = if of_host { host.run(&case) } else { interpreted::run(&case) };
        if let Some(difference) = check_case(unit, &case, ours.as_ref()) {
            failed += 1;
            first.get_or_insert_with(|| {
                let host = check_case(unit, &case, host.run(&case).as_ref());
                let verdict = match host {
                    None => "the host agrees with the model".into(),
                    Some(text) if text == difference => "the host agrees with ours".into(),
                    Some(text) => format!("the host: {text}"),
                };
                format!("{}: {difference}; {verdict}", describe(&case))
            });
        }
    }
    first.map(|text| format!("{failed} of {count}: {text}"))
}

/// The host's processor, from the moment that it is asked.
struct Host(Option<Native>);

impl Host {
    /// What the processor does natively.
    fn run(&mut self, case: &Case) -> Option<Outcome> {
        const C1: u16 = 1 << 9;
        if self.0.is_none() {
            self.0 = Native::new().ok();
        }
        let mut outcome = self.0.as_mut()?.run(std::slice::from_ref(case)).ok()?.pop()??;
        let sets_flags = matches!(decode(case).mnemonic(), M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip);
        if sets_flags && outcome.raised.vector == Raised::NONE {
            // The manual clears it, some processors leave it.
            let r = &mut outcome.registers;
            r.set_x87(r.x87_control(), r.x87_status() & !C1, r.x87_in_use());
        }
        Some(outcome)
    }
}

/// The first difference in `case`.
fn check_case(unit: Unit, case: &Case, ours: Option<&Outcome>) -> Option<String> {
    let insn = decode(case);
    let expected = match unit {
        Unit::Vector => vector::expected(case, &insn),
        Unit::X87 => x87::expected(case, &insn),
    };
    let Some(expected) = expected else { return Some("the model does not know it".into()) };
    match ours {
        Some(ours) => difference(&expected, ours),
        None => Some("it did not end".into()),
    }
}

fn difference(expected: &Expected, ours: &Outcome) -> Option<String> {
    let (a, b) = (&expected.outcome.registers, &ours.registers);
    let show = |raised: &Raised| match raised.vector {
        Raised::NONE => "no exception".to_string(),
        vector => format!("exception {vector}"),
    };
    if expected.outcome.raised.vector != ours.raised.vector {
        return Some(format!("model {}, ours {}", show(&expected.outcome.raised), show(&ours.raised)));
    }
    if (a.mxcsr() ^ b.mxcsr()) & !expected.open_mxcsr != 0 {
        return Some(format!("mxcsr: model {:#x}, ours {:#x}", a.mxcsr(), b.mxcsr()));
    }
    if let Some(i) = (0..16).find(|&i| !same_vector(expected, a.ymm(i), b.ymm(i))) {
        return Some(format!("ymm{i}: model {:x?}, ours {:x?}", a.ymm(i), b.ymm(i)));
    }
    let words = |r: &differential::state::Registers| {
        (r.x87_control(), r.x87_status() & !expected.open_status, r.x87_in_use())
    };
    if words(a) != words(b) {
        return Some(format!("x87 control, status, tags: model {:x?}, ours {:x?}", words(a), words(b)));
    }
    for i in 0..8 {
        let bits = |(significand, sign_exponent): (u64, u16)| {
            u128::from(sign_exponent) << 64 | u128::from(significand)
        };
        let fits = i == 0 && expected.choices.contains(&bits(b.st(0)));
        if a.st(i) != b.st(i) && !fits {
            return Some(format!("st({i}): model {:x?}, ours {:x?}", a.st(i), b.st(i)));
        }
    }
    let rest = |r: &differential::state::Registers| (r.gpr, r.flags & !expected.open_flags, r.rip);
    if rest(a) != rest(b) {
        return Some(format!("gpr, flags, rip: model {:x?}, ours {:x?}", rest(a), rest(b)));
    }
    let at = (0..WINDOW).find(|&i| expected.outcome.window[i] != ours.window[i])?;
    let end = (at + 16).min(WINDOW);
    let (a, b) = (&expected.outcome.window[at..end], &ours.window[at..end]);
    Some(format!("memory: model {a:02x?}, ours {b:02x?}"))
}

/// Equal, or different in lanes that are both one of the NaNs.
fn same_vector(expected: &Expected, model: [u64; 4], ours: [u64; 4]) -> bool {
    let (bytes, nans) = &expected.nans;
    let lanes = |v: [u64; 4]| {
        let bytes_of: Vec<u8> = v.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes_of
            .chunks_exact(*bytes)
            .map(|c| c.iter().rev().fold(0, |acc, b| acc << 8 | u64::from(*b)))
            .collect::<Vec<u64>>()
    };
    let same = |(a, b): (&u64, &u64)| a == b || nans.contains(a) && nans.contains(b);
    model == ours || lanes(model).iter().zip(&lanes(ours)).all(same)
}

/// The case on one line.
fn describe(case: &Case) -> String {
    let insn = decode(case);
    let r = &case.registers;
    let bytes: String =
        case.code.bytes[..case.code.len as usize].iter().map(|b| format!("{b:02x}")).collect();
    let mut line = format!("{:?} [{bytes}] mxcsr={:#x}", insn.code(), r.mxcsr());
    let words = (r.x87_control(), r.x87_status(), r.x87_in_use());
    let _ = write!(line, " x87={words:x?} st={:x?},{:x?}", r.st(0), r.st(1));
    for i in 0..insn.op_count() {
        let value = place::read(case, &insn, i);
        let _ = write!(line, " op{i}=");
        for byte in value.iter().rev() {
            let _ = write!(line, "{byte:02x}");
        }
    }
    line
}
