//! Decoded code: straight runs of operations. Where they are kept: `cache.rs`.

use crate::core::SoftCore;
use crate::mixed::may_change_code;
use crate::shared::Watch;
use alloc::vec::Vec;
use x86_decode::{Decoded, FlowControl, Instruction, Reader};
use x86_defs::Exception;
use x86_defs::cpuid::FeatureSet;
use x86_defs::flags::STATUS;
use x86_emulate::core::Core;
use x86_emulate::lower::{self, LowerContext};
use x86_emulate::{ModeKey, Op, Step};

/// Longest block in instructions.
pub const MAX_OPS: usize = 64;
/// Longest one that checks itself.
pub const MAX_CHECKED: usize = 32;

/// Room in which blocks are built, kept from one to the next.
#[derive(Default)]
pub struct Builder {
    decoded: Vec<(Instruction, u16)>,
    ops: Vec<Op<SoftCore>>,
}

impl Builder {
    /// Decodes up to `limit` instructions from `bytes`; if they check themselves (`mixed.rs`) only what then can be in a block.
    /// Their operations, the closing one included; none if not even one instruction fits the bytes.
    pub fn build(
        &mut self,
        bytes: &[u8],
        mode: ModeKey,
        features: FeatureSet,
        limit: usize,
        watch: Watch,
    ) -> &[Op<SoftCore>] {
        self.decoded.clear();
        self.ops.clear();
        let mut at = 0usize;
        let mut closing = None;
        let mut reader = Reader::new(bytes, mode.bitness(), 0, features);
        while self.decoded.len() < limit.min(MAX_OPS) {
            match reader.at(at) {
                Decoded::Instruction(insn) => {
                    self.decoded.push((insn, at as u16));
                    at += insn.len();
                    let ends = watch == Watch::Itself && may_change_code(&insn);
                    if insn.flow_control() != FlowControl::Next || ends {
                        break;
                    }
                }
                Decoded::Invalid | Decoded::TooLong if watch == Watch::Itself => break,
                Decoded::Invalid => {
                    closing = Some(Exception::InvalidOpcode);
                    break;
                }
                Decoded::TooLong => {
                    closing = Some(Exception::GeneralProtection);
                    break;
                }
                Decoded::NeedMore => break,
            }
        }
        if !self.decoded.is_empty() || closing.is_some() {
            self.lower(mode, features, at as u16, closing);
        }
        &self.ops
    }

    fn lower(&mut self, mode: ModeKey, features: FeatureSet, end: u16, closing: Option<Exception>) {
        let mut live = STATUS;
        let ctx = |at: u16, live_flags: u64| LowerContext { mode, features, at, live_flags };
        self.ops.resize(self.decoded.len(), Op::new(fall_through::<SoftCore>));
        for (op, (insn, at)) in self.ops.iter_mut().zip(&self.decoded).rev() {
            *op = lower::lower(insn, &ctx(*at, live));
            live = flags_before(insn, live);
        }
        self.ops.push(match closing {
            Some(exception) => lower::raising(exception, &ctx(end, STATUS)),
            None => Op { at: end, ..Op::new(fall_through::<SoftCore>) },
        });
    }
}

/// Flags that matter before `insn`, given those that matter after it. What may fault shows all of them to
/// the guest's handler.
fn flags_before(insn: &Instruction, live_after: u64) -> u64 {
    use x86_decode::{OpKind, flag_use};
    let pure = (0..insn.op_count()).all(|i| insn.op_kind(i) != OpKind::Memory)
        && insn.flow_control() == FlowControl::Next
        && !insn.is_privileged()
        && !insn.is_stack_instruction();
    if !pure || may_fault_or_keep_flags(insn) {
        return STATUS;
    }
    (live_after & !flag_use::modified(insn)) | flag_use::read(insn)
}

/// Only plain arithmetic and moves are looked at: division may fault, shifts by CL may change no flag.
fn may_fault_or_keep_flags(insn: &Instruction) -> bool {
    use x86_decode::Mnemonic as M;
    !matches!(
        insn.mnemonic(),
        M::Add
            | M::Sub
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Adc
            | M::Sbb
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
            | M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Lea
            | M::Xchg
            | M::Bswap
    ) || insn.op0_register().is_segment_register()
        || insn.op1_register().is_segment_register()
        || insn.op0_register().is_cr()
        || insn.op1_register().is_cr()
}

/// Closes a block that no branch ends: goes on behind it.
fn fall_through<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    op.end_block(c)
}
