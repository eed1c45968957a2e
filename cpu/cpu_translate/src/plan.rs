//! How each instruction is emitted: inline in one of a few forms, or as a call of the interpreter's handler.

use crate::emit::home;
use crate::encoding::Encoding;
use crate::liveness;
use crate::x87;
use x86_decode::{ConditionCode, FlowControl, Instruction, Mnemonic as M, OpKind, Register, allowed};
use x86_defs::cpuid::FeatureSet;
use x86_emulate::ModeKey;
use x86_emulate::lower::LowerContext;
use x86_emulate::vector::gate;

/// See the module's header.
#[derive(Clone, Copy, Debug)]
pub enum Plan {
    /// The handler.
    Call,
    /// The handler; what is behind is looked up anew.
    Barrier,
    /// Nothing.
    Nop,
    /// The guest's own bytes.
    Copy,
    /// Written again with the host's registers and memory operand.
    Encode(Encoding),
    /// As `Encode`, on vector registers.
    Vector(Encoding),
    /// As `Copy`, on vector registers: VZEROUPPER and VZEROALL.
    CopyVector,
    /// The guest's own on the x87 unit; written again if an operand is in memory.
    X87(x87::Kind, Option<Encoding>),
    /// MOV of an immediate to a register of 4 or 8 bytes.
    MovImm,
    /// LEA of 4 or 8 bytes.
    Lea,
    /// IDIV or DIV, of 8 or 4 bytes.
    Divide {
        /// IDIV.
        signed: bool,
        /// 8 bytes.
        wide: bool,
    },
    /// PUSH of a register, a word: 8 bytes in 64-bit code, 4 in 32-bit code.
    Push(u8),
    /// PUSH of an immediate, a word.
    PushImm(i32),
    /// POP to a register, a word.
    Pop(u8),
    /// LEAVE.
    Leave,
    /// PUSH of a word in memory.
    PushMemory,
    /// PUSHFQ, PUSHFD.
    PushFlags,
    /// CLI at CPL 0.
    Cli,
    /// STI at CPL 0, where another instruction follows in the superblock.
    Sti,
    /// SWAPGS at CPL 0.
    SwapGs,
    /// CLD.
    Cld,
    /// SYSCALL at CPL 3.
    Syscall,
    /// SYSRET of 64-bit code at CPL 0.
    Sysret,
    /// REP MOVS (`moves`) or REP STOS of elements of that many bytes, with addresses of 64 bits in flat segments.
    Repeat {
        /// MOVS.
        moves: bool,
        /// 1, 2, 4 or 8.
        bytes: u8,
    },
    /// MOV of CR2 to a general register at CPL 0.
    ReadCr2(u8),
    /// BT, BTS, BTR or BTC of 4 or 8 bytes in memory by a register, which reaches beyond them.
    BitString(Encoding),
    /// Conditional branch.
    Jcc(u8),
    /// Direct jump.
    Jmp,
    /// Direct call.
    CallDirect,
    /// Return, with this many bytes freed besides.
    Ret(u16),
    /// Indirect jump (`false`) or call through a register or memory.
    Indirect(bool),
}

/// How an instruction accesses its memory operand.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Bytes.
    pub size: u32,
    /// It is written, or read and written.
    pub write: bool,
    /// It must be a multiple of this (a power of two); 1 if not.
    pub align: u32,
}

/// The access to the memory operand of an instruction with this plan, if it is emitted inline and has one.
pub fn access(plan: &Plan, insn: &Instruction) -> Option<Access> {
    let size = insn.memory_size().size() as u32;
    let in_memory = insn.op0_kind() == OpKind::Memory;
    let compares = matches!(insn.mnemonic(), M::Cmp | M::Test | M::Bt);
    let write = in_memory && !compares || insn.mnemonic() == M::Xchg;
    Some(match plan {
        Plan::Encode(e) if e.rm.is_none() => {
            Access { size, write, align: if insn.mnemonic() == M::Cmpxchg16b { 16 } else { 1 } }
        }
        Plan::Vector(e) if e.rm.is_none() => {
            Access { size, write, align: crate::vector::alignment(insn, e.is_vex()) }
        }
        Plan::X87(_, Some(_)) => Access { size, write: x87::stores(insn), align: 1 },
        Plan::Divide { .. } | Plan::Indirect(_) | Plan::PushMemory if in_memory => {
            Access { size, write: false, align: 1 }
        }
        _ => return None,
    })
}

/// The guest's number of a general register of any width; high bytes have none.
pub fn number(r: Register) -> Option<u8> {
    let high = matches!(r, Register::AH | Register::CH | Register::DH | Register::BH);
    (r.is_gpr() && !high).then(|| r.full_register() as u8 - Register::RAX as u8)
}

/// Which instructions of the host may be emitted.
#[derive(Clone, Copy)]
pub struct Host {
    /// Features, for those on general registers.
    pub general: FeatureSet,
    /// For those on vector registers, if these may be used at all.
    pub vector: Option<FeatureSet>,
    /// Whether the x87 unit may be used.
    pub x87: bool,
}

fn vector(insn: &Instruction, bytes: &[u8], ctx: &LowerContext, host: FeatureSet) -> Option<Plan> {
    if !addressable(insn, ctx.mode.is_long()) {
        return None;
    }
    if matches!(insn.mnemonic(), M::Vzeroupper | M::Vzeroall) {
        let runs = allowed(insn, host) && gate::exception(insn, ctx).is_none();
        return runs.then_some(Plan::CopyVector);
    }
    crate::vector::encoding(insn, bytes, ctx, host).map(Plan::Vector)
}

/// The plan for `insn`, whose bytes are `bytes`.
pub fn plan(insn: &Instruction, bytes: &[u8], ctx: &LowerContext, host: &Host) -> Plan {
    let long = ctx.mode.is_long();
    branch(insn, long)
        .or_else(|| stack(insn, long))
        .or_else(|| simple(insn, long))
        .or_else(|| repeat(insn))
        .or_else(|| bit_string(insn, bytes, long))
        .or_else(|| arithmetic(insn, bytes, host.general, long))
        .or_else(|| unit(insn, bytes, ctx, host))
        .or_else(|| vector(insn, bytes, ctx, host.vector?))
        .unwrap_or(Plan::Call)
}

/// The plan for an instruction of the system's, after which code runs as before; `None` for others.
pub fn system(insn: &Instruction, mode: ModeKey) -> Option<Plan> {
    use x86_decode::Code as K;
    let cpl = mode.cpl();
    Some(match insn.code() {
        K::Lfence | K::Mfence | K::Sfence => Plan::Copy,
        K::Pushfq | K::Pushfd => Plan::PushFlags,
        K::Cli if cpl == 0 => Plan::Cli,
        K::Sti if cpl == 0 => Plan::Sti,
        K::Swapgs if cpl == 0 => Plan::SwapGs,
        K::Cld => Plan::Cld,
        K::Syscall if cpl == 3 && mode.is_long() => Plan::Syscall,
        K::Sysretq if cpl == 0 => Plan::Sysret,
        K::Pushd_CS | K::Pushd_SS | K::Pushd_DS | K::Pushd_ES | K::Pushd_FS | K::Pushd_GS => Plan::Call,
        K::Mov_r64_cr if cpl == 0 && insn.op1_register() == Register::CR2 => {
            Plan::ReadCr2(number(insn.op0_register())?)
        }
        K::Mov_r64_cr | K::Mov_r32_cr | K::Mov_rm16_Sreg | K::Mov_r32m16_Sreg | K::Mov_r64m16_Sreg => {
            Plan::Call
        }
        K::Rdtsc | K::Rdtscp | K::Rdpmc | K::Rdpid_r64 | K::Cpuid | K::Xgetbv | K::Rdmsr => Plan::Call,
        _ if is_prefetch(insn) => Plan::Nop,
        _ if matches!(insn.mnemonic(), M::Rdrand | M::Rdseed | M::Rdfsbase | M::Rdgsbase) => Plan::Call,
        _ => return None,
    })
}

fn unit(insn: &Instruction, bytes: &[u8], ctx: &LowerContext, host: &Host) -> Option<Plan> {
    if !host.x87 || gate::x87_exception(ctx).is_some() || !addressable(insn, ctx.mode.is_long()) {
        return None;
    }
    x87::plan(insn, bytes, ctx.mode.is_long()).map(|(kind, encoding)| Plan::X87(kind, encoding))
}

fn branch(insn: &Instruction, long: bool) -> Option<Plan> {
    use x86_decode::Code as K;
    if insn.flow_control() == FlowControl::Next {
        return None;
    }
    Some(match insn.code() {
        K::Jmp_rel8_64 | K::Jmp_rel32_64 | K::Jmp_rel8_32 | K::Jmp_rel32_32 => Plan::Jmp,
        K::Call_rel32_64 | K::Call_rel32_32 => Plan::CallDirect,
        K::Retnq | K::Retnd => Plan::Ret(0),
        K::Retnq_imm16 | K::Retnd_imm16 => Plan::Ret(insn.immediate16()),
        K::Jmp_rm64 | K::Jmp_rm32 if addressable(insn, long) => Plan::Indirect(false),
        K::Call_rm64 | K::Call_rm32 if addressable(insn, long) => Plan::Indirect(true),
        _ if insn.is_jcc_short_or_near() && insn.op0_kind() != OpKind::NearBranch16 => {
            Plan::Jcc(liveness::condition(insn))
        }
        _ => Plan::Barrier,
    })
}

fn stack(insn: &Instruction, long: bool) -> Option<Plan> {
    use x86_decode::Code as K;
    Some(match insn.code() {
        K::Push_r64 | K::Push_r32 => Plan::Push(number(insn.op0_register())?),
        K::Pushq_imm32 | K::Pushq_imm8 | K::Pushd_imm32 | K::Pushd_imm8 => {
            Plan::PushImm(signed_immediate(insn) as i32)
        }
        K::Pop_r64 | K::Pop_r32 => Plan::Pop(number(insn.op0_register())?),
        K::Leaveq | K::Leaved => Plan::Leave,
        K::Push_rm64 | K::Push_rm32 if insn.op0_kind() == OpKind::Memory && addressable(insn, long) => {
            Plan::PushMemory
        }
        _ => return None,
    })
}

fn simple(insn: &Instruction, long: bool) -> Option<Plan> {
    use x86_decode::Code as K;
    Some(match insn.mnemonic() {
        M::Nop | M::Endbr64 | M::Endbr32 => Plan::Nop,
        M::Div | M::Idiv if addressable(insn, long) => {
            let signed = insn.mnemonic() == M::Idiv;
            match insn.code() {
                K::Div_rm32 | K::Idiv_rm32 => Plan::Divide { signed, wide: false },
                K::Div_rm64 | K::Idiv_rm64 => Plan::Divide { signed, wide: true },
                _ => return None,
            }
        }
        M::Lea if insn.op0_register().size() >= 4 && has_whole_address(insn, long) => Plan::Lea,
        M::Mov
            if matches!(insn.code(), K::Mov_r32_imm32 | K::Mov_r64_imm64 | K::Mov_rm64_imm32)
                && insn.op0_kind() == OpKind::Register =>
        {
            Plan::MovImm
        }
        _ => return None,
    })
}

fn repeat(insn: &Instruction) -> Option<Plan> {
    use x86_decode::Code as K;
    let (moves, bytes) = match insn.code() {
        K::Movsb_m8_m8 => (true, 1),
        K::Movsw_m16_m16 => (true, 2),
        K::Movsd_m32_m32 => (true, 4),
        K::Movsq_m64_m64 => (true, 8),
        K::Stosb_m8_AL => (false, 1),
        K::Stosw_m16_AX => (false, 2),
        K::Stosd_m32_EAX => (false, 4),
        K::Stosq_m64_RAX => (false, 8),
        _ => return None,
    };
    let wide = insn.op0_kind() == OpKind::MemoryESRDI;
    let flat = !moves || !matches!(insn.memory_segment(), Register::FS | Register::GS);
    (insn.has_rep_prefix() && wide && flat).then_some(Plan::Repeat { moves, bytes })
}

/// Hints: no effect, no fault.
fn is_prefetch(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchw)
}

fn bit_string(insn: &Instruction, bytes: &[u8], long: bool) -> Option<Plan> {
    let tests = matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
    let far = insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register;
    if !tests || !far || insn.memory_size().size() < 4 || !addressable(insn, long) {
        return None;
    }
    Encoding::parse(bytes, long).filter(|e| !e.has_repeat()).map(Plan::BitString)
}

/// The immediate that is pushed or added, sign-extended.
pub fn signed_immediate(insn: &Instruction) -> i64 {
    let last = insn.op_count() - 1;
    match insn.op_kind(last) {
        OpKind::Immediate8to64 => insn.immediate8to64(),
        OpKind::Immediate8to32 => i64::from(insn.immediate8to32()),
        OpKind::Immediate32 => i64::from(insn.immediate32() as i32),
        _ => insn.immediate32to64(),
    }
}

/// Whether the memory operand, if there is one, can be emitted: its address has the mode's width, and its segment is flat, or
/// FS or GS. CS outside of 64-bit code may be one that cannot be read.
fn addressable(insn: &Instruction, long: bool) -> bool {
    let in_code = !long && insn.memory_segment() == Register::CS;
    has_whole_address(insn, long) && !(in_code && has_memory(insn))
}

fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

/// Whether the address of the memory operand, if there is one, has the mode's width.
fn has_whole_address(insn: &Instruction, long: bool) -> bool {
    if !has_memory(insn) {
        return true;
    }
    let wide = |r: Register| {
        r == Register::None || if long { r.is_gpr64() || r == Register::RIP } else { r.is_gpr32() }
    };
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let none = base == Register::None && index == Register::None;
    wide(base)
        && wide(index)
        && !(none
            && long
            && insn.memory_displacement64() as i32 as i64 as u64 != insn.memory_displacement64())
}

/// Instructions on general registers and memory that do on the host what they do on the guest.
fn is_arithmetic(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test => true,
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Inc | M::Dec | M::Neg | M::Not => true,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd => true,
        M::Imul | M::Mul | M::Bsf | M::Bsr | M::Popcnt | M::Tzcnt | M::Lzcnt | M::Bswap | M::Movbe => true,
        M::Andn | M::Bextr | M::Blsi | M::Blsr | M::Blsmsk | M::Bzhi | M::Pdep | M::Pext => true,
        M::Mulx | M::Rorx | M::Shlx | M::Sarx | M::Shrx | M::Adcx | M::Adox | M::Crc32 => true,
        M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo | M::Stc | M::Clc | M::Cmc => true,
        M::Xchg | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b | M::Xadd => true,
        // In memory a register's bit offset reaches beyond the operand.
        M::Bt | M::Bts | M::Btr | M::Btc => {
            insn.op0_kind() == OpKind::Register || insn.op1_kind() != OpKind::Register
        }
        // SETcc and CMOVcc: branches are gone already.
        _ => insn.condition_code() != ConditionCode::None,
    }
}

fn arithmetic(insn: &Instruction, bytes: &[u8], host: FeatureSet, long: bool) -> Option<Plan> {
    if !is_arithmetic(insn) || !allowed(insn, host) || !addressable(insn, long) {
        return None;
    }
    let mut memory = false;
    let mut high = false;
    let mut homeless: [Option<u8>; 4] = [None; 4];
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let r = insn.op_register(i);
                if !r.is_gpr() {
                    return None; // segment, control and debug registers
                }
                match number(r) {
                    None => high = true,
                    Some(n) if home(n).is_none() => homeless[i as usize & 3] = Some(n),
                    Some(_) => {}
                }
            }
            OpKind::Memory => memory = true,
            _ => {}
        }
    }
    // What lies in no host register, each once.
    let homeless_count =
        (0..4).filter(|&i| homeless[i].is_some() && !homeless[..i].contains(&homeless[i])).count();
    let verbatim = !memory && homeless_count == 0 && !uses_rsp(insn) && (long || means_the_same(bytes));
    let mut encoding = Encoding::parse(bytes, long);
    if let Some(e) = &mut encoding {
        if !long {
            e.clear_w();
        }
        // A hidden TZCNT is a BSF with a prefix that the host would not ignore.
        let meant = matches!(
            insn.mnemonic(),
            M::Popcnt | M::Tzcnt | M::Lzcnt | M::Adcx | M::Adox | M::Crc32 | M::Movbe
        );
        if e.has_repeat() && !meant && !e.is_vex() {
            return None;
        }
    }
    if verbatim {
        return Some(Plan::Copy);
    }
    if high || homeless_count > if memory { 1 } else { 2 } {
        return None;
    }
    encoding.map(Plan::Encode)
}

/// Whether an instruction of 32-bit code without memory operand is the same in 64-bit code: not INC and DEC in one byte, an
/// alias of an opcode, and VEX, of which 32-bit code ignores parts.
fn means_the_same(bytes: &[u8]) -> bool {
    let is_prefix = |b: &&u8| matches!(b, 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3);
    let opcode = bytes.iter().find(|b| !is_prefix(b));
    opcode.is_some_and(|b| !matches!(b, 0x40..=0x4F | 0x82 | 0xC4 | 0xC5))
}

fn uses_rsp(insn: &Instruction) -> bool {
    (0..insn.op_count())
        .any(|i| insn.op_kind(i) == OpKind::Register && number(insn.op_register(i)) == Some(4))
}
