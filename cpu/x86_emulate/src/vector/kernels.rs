//! Instructions that are one kernel of `x86_host_ops`: arithmetic, logic, comparison, shuffles, conversion
//! between vector registers.
//!
//! `Op::imm` holds the immediate (bits 0–7), register `c` (8–11) and the kernel's number (16–31); `dst`, `aux`
//! (`a`) and `src` (`b`) are vector registers; `width` is the size of the memory operand.

use super::{memory, mmx, unmasked};
use crate::core::{Core, Fault};
use crate::lower::{LowerContext, memory_bytes, vector_register};
use crate::op::{Handler, Op, Step};
use x86_decode::{EncodingKind, Instruction, Mnemonic, OpKind};
use x86_defs::flags;
use x86_host_ops::{Entry, Environment, Form, Kernel, Operands, Shape, Source, V, kernel_list};

/// Legacy SSE: the upper half of the YMM register stays.
pub const SSE: u8 = 0;
/// VEX.128: the upper half becomes zero.
pub const VEX128: u8 = 1;
/// VEX.256.
pub const VEX256: u8 = 2;

macro_rules! map {
    ($($shape:ident $environment:ident { $($legacy:ident $($vex:ident)?,)* })*) => {
        fn kernel_of(mnemonic: Mnemonic) -> Option<Kernel> {
            Some(match mnemonic {
                $($(Mnemonic::$legacy $(| Mnemonic::$vex)? => Kernel::$legacy,)*)*
                _ => return None,
            })
        }
    };
}
kernel_list!(map);

/// Lowers an instruction that is a kernel.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let kernel = kernel_of(insn.mnemonic())?;
    let entry = kernel.entry();
    if insn.op0_kind() != OpKind::Register {
        return match kernel {
            Kernel::Vcvtps2ph => Some(lower_vcvtps2ph(insn, ctx)),
            _ => None, // CMPSD, the string instruction
        };
    }
    if insn.op0_register().is_mm() {
        return Some(mmx::lower_kernel(insn, ctx, kernel));
    }
    let form = form_of(insn);
    let operands = (0..insn.op_count()).filter(|i| insn.op_kind(*i) != OpKind::Immediate8).count() as u32;
    let has_immediate = operands < insn.op_count();
    let mut op = ctx.op(insn, Op::<C>::new(run::<C, SSE, false, false>).run);
    let imm = if has_immediate { op.imm as u8 } else { 0 };
    let register = |i: u32| vector_register(insn.op_register(i));
    op.dst = register(0);
    if has_immediate && (entry.shape == Shape::Shift || is_vpermil(kernel)) {
        return lower_control(insn, op, kernel, imm, form);
    }
    // Which operand is `b`: the last but the blend's selector.
    let b = if operands == 4 { 2 } else { operands - 1 };
    op.aux = if form == SSE || operands < 3 { op.dst } else { register(1) };
    let c = match entry.shape {
        Shape::Fused => op.dst,
        Shape::Blend if operands == 4 => register(3),
        _ => 0,
    };
    let in_memory = insn.op_kind(b) == OpKind::Memory;
    let mut imm = imm;
    if in_memory {
        op.width = memory_bytes(insn) as u8;
        if kernel == Kernel::Insertps {
            imm &= 0x3F; // the memory operand has one lane
        }
    } else {
        op.src = register(b);
    }
    op.imm = pack(kernel, c, imm);
    let is_float = entry.environment != Environment::Integer;
    op.run = match (form, in_memory, is_float) {
        (SSE, false, false) => run::<C, SSE, false, false>,
        (SSE, true, false) => run::<C, SSE, true, false>,
        (SSE, false, true) => run::<C, SSE, false, true>,
        (SSE, true, true) => run::<C, SSE, true, true>,
        (VEX128, false, false) => run::<C, VEX128, false, false>,
        (VEX128, true, false) => run::<C, VEX128, true, false>,
        (VEX128, false, true) => run::<C, VEX128, false, true>,
        (VEX128, true, true) => run::<C, VEX128, true, true>,
        (_, false, false) => run::<C, VEX256, false, false>,
        (_, true, false) => run::<C, VEX256, true, false>,
        (_, false, true) => run::<C, VEX256, false, true>,
        (_, true, true) => run::<C, VEX256, true, true>,
    };
    Some(op)
}

/// `imm` of an operation of this family.
pub fn pack(kernel: Kernel, c: u8, imm: u8) -> u64 {
    u64::from(kernel as u16) << 16 | u64::from(c & 15) << 8 | u64::from(imm)
}

/// Encoding and width of `insn`: 256 bits if any operand is.
pub fn form_of(insn: &Instruction) -> u8 {
    let wide = (0..insn.op_count()).any(|i| match insn.op_kind(i) {
        OpKind::Register => insn.op_register(i).is_ymm(),
        OpKind::Memory => memory_bytes(insn) == 32,
        _ => false,
    });
    match (insn.encoding() == EncodingKind::VEX, wide) {
        (false, _) => SSE,
        (true, false) => VEX128,
        (true, true) => VEX256,
    }
}

fn is_vpermil(kernel: Kernel) -> bool {
    matches!(kernel, Kernel::Vpermilps | Kernel::Vpermilpd)
}

/// The host's registers for a form.
pub fn host_form(form: u8) -> Form {
    if form == VEX256 { Form::Ymm } else { Form::Xmm }
}

/// The number of the operation's kernel.
#[inline(always)]
pub fn kernel_number<C>(op: &Op<C>) -> u16 {
    (op.imm >> 16) as u16
}

#[inline(always)]
fn entry_of<C>(op: &Op<C>) -> &'static Entry {
    Entry::of(kernel_number(op))
}

/// The operation's operands, `b` aside.
#[inline(always)]
pub fn operands_of<'a, C>(op: &Op<C>, b: Source<'a>) -> Operands<'a> {
    Operands { dst: op.dst, a: op.aux, b, c: (op.imm >> 8) as u8, imm: op.imm as u8 }
}

/// Stores `value` into a vector register as `form` does.
#[inline(always)]
pub fn commit(register: &mut V, value: &V, form: u8) {
    register[0] = value[0];
    register[1] = value[1];
    match form {
        SSE => {}
        VEX128 => (register[2], register[3]) = (0, 0),
        _ => (register[2], register[3]) = (value[2], value[3]),
    }
}

fn run<C: Core, const FORM: u8, const MEMORY: bool, const FLOAT: bool>(c: &mut C, op: &Op<C>) -> Step {
    match try_run::<C, FORM, MEMORY, FLOAT>(c, op) {
        Ok(()) => Step::Next,
        Err(Fault) => Step::Fault,
    }
}

#[inline(always)]
fn try_run<C: Core, const FORM: u8, const MEMORY: bool, const FLOAT: bool>(
    c: &mut C,
    op: &Op<C>,
) -> Result<(), Fault> {
    let value;
    let b = if MEMORY {
        value = load_operand::<C, FORM>(c, op)?;
        Source::Value(&value)
    } else {
        Source::Register(op.src)
    };
    let entry = entry_of(op);
    let form = host_form(FORM);
    let operands = operands_of(op, b);
    let x = &mut c.cpu_mut().x;
    if !FLOAT {
        entry.run(form, &mut x.ymm, &operands);
    } else if x.mxcsr & MASKS == MASKS {
        x.mxcsr |= entry.run_float(form, &mut x.ymm, &operands, x.mxcsr);
    } else {
        return unmasked::run::<C, FORM>(c, op, b);
    }
    if FORM == VEX128 {
        let dst = &mut c.cpu_mut().x.ymm[usize::from(op.dst & 15)];
        (dst[2], dst[3]) = (0, 0);
    }
    Ok(())
}

/// The memory operand; legacy 16-byte operands must be aligned.
#[inline(always)]
fn load_operand<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Result<V, Fault> {
    let mut linear = op.linear_read(c, u64::from(op.width))?;
    if FORM == SSE && op.width == 16 {
        linear = memory::aligned(c, linear, 16)?;
    }
    memory::load(c, linear, op.width)
}

/// The masks of MXCSR.
pub const MASKS: u32 = 0x1F80;

/// Shifts by an immediate count and VPERMIL* with an immediate: the kernel with a computed `b`.
fn lower_control<C: Core>(
    insn: &Instruction,
    mut op: Op<C>,
    kernel: Kernel,
    imm: u8,
    form: u8,
) -> Option<Op<C>> {
    let a = insn.op_count() - 2;
    op.imm = pack(kernel, 0, imm);
    if insn.op_kind(a) == OpKind::Memory {
        op.width = memory_bytes(insn) as u8;
    } else {
        op.aux = vector_register(insn.op_register(a));
    }
    op.src = u8::from(insn.op_kind(a) == OpKind::Memory);
    op.run = match form {
        SSE => run_control::<C, SSE>,
        VEX128 => run_control::<C, VEX128>,
        _ => run_control::<C, VEX256>,
    };
    Some(op)
}

fn run_control<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let a = if op.src == 1 {
        match load_operand::<C, FORM>(c, op) {
            Ok(v) => v,
            Err(Fault) => return Step::Fault,
        }
    } else {
        c.cpu().x.ymm[usize::from(op.aux & 15)]
    };
    let entry = entry_of(op);
    let b = match entry.shape {
        Shape::Shift => [op.imm & 0xFF, 0, 0, 0],
        _ => vpermil_control(op.imm as u8, (op.imm >> 16) as u16 == Kernel::Vpermilpd as u16),
    };
    let out = entry.run_values(host_form(FORM), &a, &b, &[0; 4], 0);
    commit(&mut c.cpu_mut().x.ymm[usize::from(op.dst & 15)], &out, FORM);
    Step::Next
}

/// The control register that does what an immediate does.
fn vpermil_control(imm: u8, doubles: bool) -> V {
    let imm = u64::from(imm);
    if doubles {
        core::array::from_fn(|i| (imm >> i & 1) << 1)
    } else {
        let half = [imm & 3 | (imm >> 2 & 3) << 32, imm >> 4 & 3 | (imm >> 6 & 3) << 32];
        [half[0], half[1], half[0], half[1]]
    }
}

/// VCVTPS2PH to memory.
fn lower_vcvtps2ph<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Op<C> {
    let form = form_of(insn);
    let mut op = ctx.op(
        insn,
        if form == VEX256 { store_half::<C, VEX256> } else { store_half::<C, VEX128> } as Handler<C>,
    );
    op.imm = pack(Kernel::Vcvtps2ph, 0, op.imm as u8);
    op.src = vector_register(insn.op1_register());
    op.width = if form == VEX256 { 16 } else { 8 };
    op
}

fn store_half<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let store = |c: &mut C| -> Result<(), Fault> {
        let linear = op.linear_write(c, u64::from(op.width))?;
        memory::check_alignment(c, linear, u64::from(op.width))?;
        c.probe(linear, u64::from(op.width), true)?;
        let operands = operands_of(op, Source::Register(op.src));
        let out = unmasked::compute::<C, FORM>(c, kernel_number(op), &operands)?;
        memory::store(c, linear, &out, op.width)
    };
    match store(c) {
        Ok(()) => Step::Next,
        Err(Fault) => Step::Fault,
    }
}

const _: () = assert!(flags::MXCSR_RESET == MASKS);
