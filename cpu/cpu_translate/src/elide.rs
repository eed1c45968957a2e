//! Elision of TLB checks: memory accesses of a superblock that surely lie in one page share a check.
//!
//! An address is a root (what registers held at some point of the block, a segment) plus a known offset. Accesses of one
//! root that lie close together form a group. The first of them checks the whole range that the group reaches and
//! keeps where it lies in guest RAM ([`slot::GROUPS`]); the others need no check. Between them nothing takes the
//! mapping away: flushes and revocations happen outside of emitted code or in barriers, which end a block.
//! Where the range cannot be had as a whole, a careful translation goes on (`engine.rs`): its groups are small, and
//! accesses of the roots that its first instruction has, for which it was made, belong to none.
//!
//! [`slot::GROUPS`]: crate::thunks::slot::GROUPS

use crate::block::{Item, Source};
use crate::plan::{self, Access, Plan, number};
use crate::thunks::slot;
use smallvec::SmallVec;
use x86_decode::{Code, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

/// Longest range of a group, in bytes: the longer, the more often it crosses a page.
const MAX_SPAN: i64 = 256;
/// In a careful translation.
const CAREFUL_SPAN: i64 = 48;
const RSP: usize = 4;
const RBP: usize = 5;

/// An access that belongs to a group.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Number of the group in the block.
    pub group: u8,
    /// Bytes from the start of the group's range.
    pub at: u32,
    /// Checks the range for all.
    pub first: bool,
}

/// What the first access of a group checks.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// Length in bytes.
    pub bytes: u32,
    /// Some access writes.
    pub write: bool,
    /// The start must be a multiple of this.
    pub align: u32,
}

/// What a register holds: `root` plus a number.
#[derive(Clone, Copy, PartialEq)]
struct Value {
    root: u32,
    offset: i64,
}

/// All of an address but the number that is added.
#[derive(Clone, Copy, PartialEq)]
struct Root {
    base: Option<u32>,
    index: Option<(u32, u32)>,
    /// FS and GS; the others' bases are 0.
    segment: Option<(Register, u32)>,
}

/// What the general registers hold.
struct Tracker {
    values: [Value; 16],
    next: u32,
    /// Times that GS changed.
    gs: u32,
    /// 64-bit code; else everything is modulo 4 GiB.
    wide: bool,
    factory: InstructionInfoFactory,
}

impl Tracker {
    fn new(wide: bool) -> Self {
        let values = std::array::from_fn(|n| Value { root: n as u32, offset: 0 });
        Self { values, next: 16, gs: 0, wide, factory: InstructionInfoFactory::new() }
    }

    /// Bytes that PUSH takes.
    fn word(&self) -> i64 {
        if self.wide { 8 } else { 4 }
    }

    fn forget(&mut self, register: usize) {
        self.values[register] = Value { root: self.next, offset: 0 };
        self.next += 1;
    }

    fn plus(&self, register: usize, more: i64) -> Value {
        let v = self.values[register];
        Value { offset: v.offset.wrapping_add(more), ..v }
    }

    /// Goes on behind `item`.
    fn advance(&mut self, item: &Item) {
        match item.plan {
            Plan::Push(_) | Plan::PushImm(_) | Plan::PushMemory | Plan::PushFlags | Plan::CallDirect => {
                self.values[RSP] = self.plus(RSP, -self.word());
            }
            Plan::SwapGs => self.gs += 1,
            Plan::Ret(more) => self.values[RSP] = self.plus(RSP, self.word() + i64::from(more)),
            Plan::Pop(to) => {
                self.values[RSP] = self.plus(RSP, self.word()); // POP RSP forgets it again
                self.forget(to.into());
            }
            Plan::Leave => {
                self.values[RSP] = self.plus(RBP, self.word());
                self.forget(RBP);
            }
            _ => match self.derived(&item.insn) {
                Some((to, value)) => self.values[to] = value,
                None => self.forget_written(&item.insn),
            },
        }
    }

    fn forget_written(&mut self, insn: &Instruction) {
        let mut written = [false; 16];
        for used in self.factory.info(insn).used_registers() {
            let reads = matches!(used.access(), OpAccess::None | OpAccess::Read | OpAccess::CondRead);
            if !reads && used.register().is_gpr() {
                let full = used.register().full_register() as usize - Register::RAX as usize;
                written[full] = true;
            }
        }
        (0..16).filter(|&n| written[n]).for_each(|n| self.forget(n));
    }

    /// The register that `insn` writes, and its value, if that is another's plus a number.
    fn derived(&self, insn: &Instruction) -> Option<(usize, Value)> {
        let to = number(insn.op0_register()).map(usize::from)?;
        let more = || plan::signed_immediate(insn);
        if !self.wide {
            return Some((to, self.derived_32(insn, to)?));
        }
        let value = match insn.code() {
            Code::Mov_r64_rm64 | Code::Mov_rm64_r64 if insn.op1_kind() == OpKind::Register => {
                self.plus(number(insn.op1_register())?.into(), 0)
            }
            Code::Lea_r64_m if insn.memory_index() == Register::None && insn.memory_base().is_gpr64() => {
                self.plus(number(insn.memory_base())?.into(), insn.memory_displacement64() as i64)
            }
            Code::Add_rm64_imm8 | Code::Add_rm64_imm32 | Code::Add_RAX_imm32 => self.plus(to, more()),
            Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Sub_RAX_imm32 => {
                self.plus(to, more().wrapping_neg())
            }
            Code::Inc_rm64 => self.plus(to, 1),
            Code::Dec_rm64 => self.plus(to, -1),
            _ => return None,
        };
        Some((to, value))
    }

    /// As `derived`, of 32-bit code.
    fn derived_32(&self, insn: &Instruction, to: usize) -> Option<Value> {
        let more = || plan::signed_immediate(insn);
        Some(match insn.code() {
            Code::Mov_r32_rm32 | Code::Mov_rm32_r32
                if insn.op1_kind() == OpKind::Register && insn.op0_kind() == OpKind::Register =>
            {
                self.plus(number(insn.op1_register())?.into(), 0)
            }
            Code::Lea_r32_m if insn.memory_index() == Register::None && insn.memory_base().is_gpr32() => {
                self.plus(number(insn.memory_base())?.into(), displacement(insn))
            }
            Code::Add_rm32_imm8 | Code::Add_rm32_imm32 | Code::Add_EAX_imm32 => self.plus(to, more()),
            Code::Sub_rm32_imm8 | Code::Sub_rm32_imm32 | Code::Sub_EAX_imm32 => {
                self.plus(to, more().wrapping_neg())
            }
            Code::Inc_rm32 | Code::Inc_r32 => self.plus(to, 1),
            Code::Dec_rm32 | Code::Dec_r32 => self.plus(to, -1),
            _ => return None,
        })
    }

    /// Root and offset of `insn`'s memory operand, in the page at `linear`.
    fn address(&self, insn: &Instruction, linear: u64) -> Option<(Root, i64)> {
        let mut offset = if self.wide { insn.memory_displacement64() as i64 } else { displacement(insn) };
        let base = match insn.memory_base() {
            Register::None => None,
            Register::RIP => {
                offset = offset.wrapping_add(linear as i64);
                None
            }
            r => {
                let v = self.values[usize::from(number(r)?)];
                offset = offset.wrapping_add(v.offset);
                Some(v.root)
            }
        };
        let index = match insn.memory_index() {
            Register::None => None,
            r => {
                let (v, scale) = (self.values[usize::from(number(r)?)], insn.memory_index_scale());
                offset = offset.wrapping_add(v.offset.wrapping_mul(i64::from(scale)));
                Some((v.root, scale))
            }
        };
        let segment = match insn.memory_segment() {
            Register::FS => Some((Register::FS, 0)),
            Register::GS => Some((Register::GS, self.gs)),
            _ => None,
        };
        Some((Root { base, index, segment }, offset))
    }
}

/// The displacement of an address of 32 bits.
fn displacement(insn: &Instruction) -> i64 {
    i64::from(insn.memory_displacement64() as i32)
}

/// A group on its way.
struct Open {
    root: Root,
    start: i64,
    end: i64,
    write: bool,
    align: u32,
    /// An offset that must be a multiple of `align`.
    aligned: i64,
    /// Index of the item, whether it is the implied access to the stack, offset.
    members: SmallVec<[(usize, bool, i64); 4]>,
}

impl Open {
    fn new(root: Root, offset: i64, access: Access) -> Self {
        let end = offset.saturating_add(access.size.into());
        let (write, align) = (access.write, access.align);
        Self { root, start: offset, end, write, align, aligned: offset, members: SmallVec::new() }
    }

    /// Takes one more access in, if it fits.
    fn join(&mut self, root: Root, offset: i64, access: Access, span: i64) -> bool {
        let start = self.start.min(offset);
        let end = self.end.max(offset.saturating_add(access.size.into()));
        let common = i64::from(self.align.min(access.align)) - 1;
        if root != self.root || end.saturating_sub(start) > span || (self.aligned ^ offset) & common != 0 {
            return false;
        }
        if access.align > self.align {
            (self.align, self.aligned) = (access.align, offset);
        }
        (self.start, self.end, self.write) = (start, end, self.write | access.write);
        true
    }

    /// Where the range starts: at or below the first access, aligned as it must be.
    fn from(&self) -> i64 {
        self.start.wrapping_sub(self.start.wrapping_sub(self.aligned) & (i64::from(self.align) - 1))
    }
}

/// The implied access of `plan` to the stack: bytes from RSP.
fn stack_access(plan: Plan, word: i64) -> Option<(i64, Access)> {
    let access = |write| Access { size: word as u32, write, align: 1 };
    match plan {
        Plan::Push(_) | Plan::PushImm(_) | Plan::PushMemory | Plan::PushFlags => Some((-word, access(true))),
        Plan::CallDirect | Plan::Indirect(true) => Some((-word, access(true))),
        Plan::Pop(_) | Plan::Ret(_) => Some((0, access(false))),
        _ => None,
    }
}

/// Finds the groups of `source`, which is of the page at `linear`, 64-bit code (`wide`) or 32-bit code.
pub fn find_groups(source: &mut Source, linear: u64, wide: bool, careful: bool) {
    let mut tracker = Tracker::new(wide);
    let mut open: Vec<Open> = Vec::new();
    let span = if careful { CAREFUL_SPAN } else { MAX_SPAN };
    // Their range was not to be had: in a group they would ask for a careful translation at each instruction.
    let mut alone: Vec<Root> = Vec::new();
    let mut add = |root: Root, offset, access, item, stack| {
        if careful && item == 0 {
            alone.push(root);
        } else if !alone.contains(&root) {
            add(&mut open, (root, offset, access), (item, stack), span);
        }
    };
    for (n, item) in source.items.iter().enumerate() {
        // The operand of a PUSH is checked behind the stack, by itself: were it the first of a group, the slow way of the
        // stack's check would lead past its own.
        if !matches!(item.plan, Plan::PushMemory)
            && let Some(access) = plan::access(&item.plan, &item.insn)
            && let Some((root, offset)) = tracker.address(&item.insn, linear)
        {
            add(root, offset, access, n, false);
        }
        let stack = if matches!(item.plan, Plan::Leave) {
            Some((tracker.values[RBP], 0, Access { size: tracker.word() as u32, write: false, align: 1 }))
        } else {
            stack_access(item.plan, tracker.word()).map(|(at, access)| (tracker.values[RSP], at, access))
        };
        if let Some((v, at, access)) = stack {
            let root = Root { base: Some(v.root), index: None, segment: None };
            add(root, v.offset.wrapping_add(at), access, n, true);
        }
        tracker.advance(item);
    }
    for group in open.iter().filter(|g| g.members.len() > 1).take(slot::MAX_GROUPS) {
        let number = source.groups.len() as u8;
        let from = group.from();
        let bytes = group.end.wrapping_sub(from) as u32;
        source.groups.push(Range { bytes, write: group.write, align: group.align });
        for (i, (n, stack, offset)) in group.members.iter().enumerate() {
            let member = Member { group: number, at: offset.wrapping_sub(from) as u32, first: i == 0 };
            let item = &mut source.items[*n];
            *(if *stack { &mut item.stack } else { &mut item.operand }) = Some(member);
        }
    }
}

fn add(
    open: &mut Vec<Open>,
    (root, offset, access): (Root, i64, Access),
    (item, stack): (usize, bool),
    span: i64,
) {
    // The newest one: a root has more than one when it is accessed in places that are far apart.
    let newest = open.iter_mut().rev().find(|g| g.root == root);
    if let Some(group) = newest
        && group.join(root, offset, access, span)
    {
        return group.members.push((item, stack, offset));
    }
    let mut group = Open::new(root, offset, access);
    group.members.push((item, stack, offset));
    open.push(group);
}
