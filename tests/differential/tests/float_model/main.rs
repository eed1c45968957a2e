//! The interpreter's vector and x87 arithmetic against a model of it by rustc_apfloat and the manuals' rules.
//!
//! The interpreter runs the host's own instructions, so the comparison with the host shows that operands arrive and
//! results are kept, not what is computed. Here every result, flag and exception is computed without the host.
//!
//! `BEDPLATE_CAMPAIGN` runs many cases from a new seed; `BEDPLATE_SEED`, `BEDPLATE_CASES` and `BEDPLATE_FORMS` (a
//! part of a form's name) repeat a run or a part of it. With `BEDPLATE_HOST` the host's processor takes the
//! interpreter's place: that checks the model.
//!
//! - `real`: exact results by rustc_apfloat, rounded once. `value`: encodings.
//! - `lane`, `vector`, `conversion`: SSE to FMA. `x87` and its kin: the x87 unit. `place`: operands of a case.
//! - `forms`: which instructions, and which not, with the reason. `numbers`, `cases`: random operands and cases.
//!   `check`: a run.

mod cases;
mod check;
mod conversion;
mod forms;
mod lane;
mod numbers;
mod place;
mod real;
mod value;
mod vector;
mod x87;
mod x87_compare;
mod x87_compute;
mod x87_store;

#[test]
fn vector_arithmetic_is_what_the_manual_says() {
    check::run(forms::Unit::Vector);
}

#[test]
fn x87_arithmetic_is_what_the_manual_says() {
    check::run(forms::Unit::X87);
}
