//! A failing case cut down to what it needs, on one line.

use crate::compare::{decode, difference};
use crate::interpreted;
use crate::native::Native;
use crate::state::Case;
use iced_x86::{Formatter, NasmFormatter};
use std::fmt::Write;

/// Whether `case` still fails, and how.
fn failure(native: &mut Native, case: &Case) -> Option<String> {
    let host = native.run(std::slice::from_ref(case)).ok()?.pop()?;
    match (host, interpreted::run(case)) {
        (Some(host), Some(ours)) => difference(case, &host, &ours),
        (None, _) => Some("the host process died".into()),
        (_, None) => Some("the interpreter did not end".into()),
    }
}

/// Puts every part of `case` to its initial value that need not be different, and describes the rest.
pub fn describe(native: &mut Native, case: &Case, difference: &str) -> String {
    let mut case = *case;
    let Some(mut last) = failure(native, &case) else {
        return format!("{}: does not fail alone: {difference}", text(&case));
    };
    let wanted = kind(&last);
    let mut attempt = |case: &mut Case, change: &dyn Fn(&mut Case)| {
        let mut changed = *case;
        change(&mut changed);
        if changed != *case
            && let Some(text) = failure(native, &changed)
            && kind(&text) == wanted
        {
            (*case, last) = (changed, text);
        }
    };
    attempt(&mut case, &|c| c.window.fill(0));
    attempt(&mut case, &|c| c.registers.flags = 0x202);
    attempt(&mut case, &|c| c.registers.set_mxcsr(0x1F80));
    attempt(&mut case, &|c| c.registers.set_x87(0x37F, 0, 0xFF));
    attempt(&mut case, &|c| c.registers.xsave[32..160].fill(0));
    let is_xsave = crate::generate::is_xsave(&decode(&case));
    for i in 0..16 {
        if !is_xsave || (i != 0 && i != 2) {
            attempt(&mut case, &|c| c.registers.gpr[i] = 0);
        }
        attempt(&mut case, &|c| c.registers.set_ymm(i, [0; 4]));
    }
    let mut line = text(&case);
    let r = &case.registers;
    for (i, v) in r.gpr.iter().enumerate().filter(|(_, v)| **v != 0) {
        let _ = write!(line, " r{i}={v:#x}");
    }
    if r.flags != 0x202 {
        let _ = write!(line, " flags={:#x}", r.flags);
    }
    if r.mxcsr() != 0x1F80 {
        let _ = write!(line, " mxcsr={:#x}", r.mxcsr());
    }
    for i in (0..16).filter(|&i| r.ymm(i) != [0; 4]) {
        let _ = write!(line, " ymm{i}={:x?}", r.ymm(i));
    }
    let words = (r.x87_control(), r.x87_status(), r.x87_in_use());
    if words != (0x37F, 0, 0xFF) || r.xsave[32..160].iter().any(|b| *b != 0) {
        let st: Vec<_> = (0..8).map(|i| format!("{:x}:{:016x}", r.st(i).1, r.st(i).0)).collect();
        let _ = write!(line, " x87={words:x?} st={}", st.join(","));
    }
    if case.window.iter().any(|b| *b != 0) {
        let near = crate::compare::operand_bytes(&case).map_or(String::new(), |b| format!(" {b:02x?}"));
        let _ = write!(line, " (memory matters{near})");
    }
    format!("{line}: {last}")
}

/// A difference without its numbers: a smaller case must fail in the same way.
fn kind(text: &str) -> String {
    let word = |w: &&str| !w.contains("0x") && w.chars().all(|c| c.is_alphabetic());
    text.split([' ', ',']).filter(word).collect::<Vec<_>>().join(" ")
}

fn text(case: &Case) -> String {
    let mut line = String::new();
    let insn = decode(case);
    NasmFormatter::new().format(&insn, &mut line);
    let bytes: String =
        case.code.bytes[..case.code.len as usize].iter().map(|b| format!("{b:02x}")).collect();
    format!("{:?} `{line}` [{bytes}]{}", insn.code(), if case.code.is_32 { " in 32-bit code" } else { "" })
}
