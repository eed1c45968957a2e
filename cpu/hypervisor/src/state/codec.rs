//! Saved form of [`VcpuState`], version 1.
//!
//! Tags (all critical; left out at zero unless marked `!`, which must be there):
//! 1! general registers, RIP, RFLAGS · 2! segments, LDTR, TR · 3! GDTR, IDTR · 4! CR0, CR2, CR3, CR4, EFER, XCR0 ·
//! 5! DR0–3, 6, 7 · 6 PDPTEs · 7 MSRs as pairs · 8 run state · 9 shadow · 10 NMI pending · 11 NMI blocked ·
//! 12 exception · 13 TSC offset · 14 TSC_ADJUST · 15 TSC deadline · 16 local APIC · 17 interrupt under way (its
//! vector plus one) ·
//! 32 + n: component n of the extended state (32! x87, 33! SSE, 34 AVX) ·
//! reserved: 96 SMBASE, 97 in SMM, 98 SMRAM-protected state, 112 nested VMX, 113 nested SVM.

use super::{Float80, InterruptShadow, PendingEvent, RunState, SseState, VcpuState, X87State};
use alloc::vec::Vec;
use saved_state::{CRITICAL, FieldWriter, Fields, RestoreError, SavedState, StateBlob};
use x86_defs::control::*;
use x86_defs::{DescriptorTable, Exception, Segment, SegmentAttributes, flags, msr, paging};

const REGISTERS: u16 = CRITICAL | 1;
const SEGMENTS: u16 = CRITICAL | 2;
const TABLES: u16 = CRITICAL | 3;
const CONTROL: u16 = CRITICAL | 4;
const DEBUG: u16 = CRITICAL | 5;
const PDPTES: u16 = CRITICAL | 6;
const MSRS: u16 = CRITICAL | 7;
const RUN_STATE: u16 = CRITICAL | 8;
const SHADOW: u16 = CRITICAL | 9;
const NMI_PENDING: u16 = CRITICAL | 10;
const NMI_BLOCKED: u16 = CRITICAL | 11;
const EXCEPTION: u16 = CRITICAL | 12;
const TSC_OFFSET: u16 = CRITICAL | 13;
const TSC_ADJUST: u16 = CRITICAL | 14;
const TSC_DEADLINE: u16 = CRITICAL | 15;
const APIC: u16 = CRITICAL | 16;
const INTERRUPT: u16 = CRITICAL | 17;
const X87: u16 = CRITICAL | 32;
const SSE: u16 = CRITICAL | 33;
const AVX: u16 = CRITICAL | 34;

/// Most MSRs in a state.
const MAX_MSRS: usize = 512;
const SEGMENT_BYTES: usize = 17;
const X87_BYTES: usize = 107;
const SSE_BYTES: usize = 260;
const MAX_APIC_BYTES: usize = 64 << 10;

/// CR4 bits that any CPU model has.
const CR4_KNOWN: u64 = CR4_VME
    | CR4_PVI
    | CR4_TSD
    | CR4_DE
    | CR4_PSE
    | CR4_PAE
    | CR4_MCE
    | CR4_PGE
    | CR4_PCE
    | CR4_OSFXSR
    | CR4_OSXMMEXCPT
    | CR4_UMIP
    | CR4_FSGSBASE
    | CR4_PCIDE
    | CR4_OSXSAVE
    | CR4_SMEP
    | CR4_SMAP;

impl SavedState for VcpuState {
    const KIND: &'static str = "vcpu";
    const VERSION: u32 = 1;

    fn encode(&self, w: &mut FieldWriter) {
        #[rustfmt::skip]
        let Self {
            gpr, rip, rflags, segments, ldtr, tr, gdtr, idtr, cr0, cr2, cr3, cr4, efer, xcr0, dr, pdpte, msrs, x87,
            sse, avx, apic, run_state, shadow, nmi_pending, nmi_blocked, exception, interrupt, tsc_offset,
            tsc_adjust, tsc_deadline,
        } = self;
        w.uints(REGISTERS, gpr.iter().copied().chain([*rip, *rflags]));
        let mut raw = Vec::new();
        segments.iter().chain([ldtr, tr]).for_each(|s| put_segment(&mut raw, s));
        w.bytes(SEGMENTS, &raw);
        raw.clear();
        for DescriptorTable { base, limit } in [gdtr, idtr] {
            raw.extend_from_slice(&base.to_le_bytes());
            raw.extend_from_slice(&limit.to_le_bytes());
        }
        w.bytes(TABLES, &raw);
        w.uints(CONTROL, [*cr0, *cr2, *cr3, *cr4, *efer, *xcr0]);
        w.uints(DEBUG, *dr);
        if *pdpte != [0; 4] {
            w.uints(PDPTES, *pdpte);
        }
        w.uints(MSRS, msrs.iter().flat_map(|(number, value)| [u64::from(*number), *value]));
        w.uint(RUN_STATE, *run_state as u8).uint(SHADOW, *shadow as u8);
        w.flag(NMI_PENDING, *nmi_pending).flag(NMI_BLOCKED, *nmi_blocked);
        if let Some(event) = exception {
            w.bytes(EXCEPTION, &put_event(event));
        }
        w.uint(INTERRUPT, interrupt.map_or(0, |vector| u32::from(vector) + 1));
        w.uint(TSC_OFFSET, *tsc_offset).uint(TSC_ADJUST, *tsc_adjust).uint(TSC_DEADLINE, *tsc_deadline);
        if let Some(blob) = apic {
            w.nested(APIC, &NestedBlob(blob.clone()));
        }
        w.bytes(X87, &put_x87(x87)).bytes(SSE, &put_sse(sse));
        if *avx != [[0; 2]; 16] {
            w.bytes(AVX, &put_halves(avx));
        }
    }

    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let registers: [u64; 18] = numbers(r, REGISTERS, "general registers")?;
        let [cr0, cr2, cr3, cr4, efer, xcr0] = numbers(r, CONTROL, "control registers")?;
        let (segments, ldtr, tr) = get_segments(r)?;
        let [gdtr, idtr] = get_tables(r)?;
        let state = Self {
            gpr: core::array::from_fn(|i| registers[i]),
            rip: registers[16],
            rflags: registers[17],
            segments,
            ldtr,
            tr,
            gdtr,
            idtr,
            cr0,
            cr2,
            cr3,
            cr4,
            efer,
            xcr0,
            dr: numbers(r, DEBUG, "debug registers")?,
            pdpte: optional_numbers(r, PDPTES)?.unwrap_or_default(),
            msrs: get_msrs(r)?,
            x87: get_x87(&required::<X87_BYTES>(r, X87, "x87 state")?),
            sse: get_sse(&required::<SSE_BYTES>(r, SSE, "SSE state")?),
            avx: get_halves(&r.array::<256>(AVX)?),
            apic: r.nested::<NestedBlob>(APIC)?.map(|b| b.0),
            run_state: match r.uint::<u8>(RUN_STATE)? {
                0 => RunState::Running,
                1 => RunState::Halted,
                2 => RunState::WaitForSipi,
                3 => RunState::Shutdown,
                _ => return Err(RestoreError::Value { tag: RUN_STATE, reason: "no such run state" }),
            },
            shadow: match r.uint::<u8>(SHADOW)? {
                0 => InterruptShadow::None,
                1 => InterruptShadow::Sti,
                2 => InterruptShadow::MovSs,
                _ => return Err(RestoreError::Value { tag: SHADOW, reason: "no such interrupt shadow" }),
            },
            nmi_pending: r.flag(NMI_PENDING)?,
            nmi_blocked: r.flag(NMI_BLOCKED)?,
            exception: get_event(r)?,
            interrupt: match r.uint::<u32>(INTERRUPT)? {
                0 => None,
                n @ 1..=256 => Some((n - 1) as u8),
                _ => return Err(RestoreError::Value { tag: INTERRUPT, reason: "no such vector" }),
            },
            tsc_offset: r.uint(TSC_OFFSET)?,
            tsc_adjust: r.uint(TSC_ADJUST)?,
            tsc_deadline: r.uint(TSC_DEADLINE)?,
        };
        state.validate()?;
        Ok(state)
    }
}

impl VcpuState {
    /// Refuses what no processor could hold.
    fn validate(&self) -> Result<(), RestoreError> {
        let refuse = |tag, reason| Err(RestoreError::Value { tag, reason });
        if self.rflags & flags::FIXED_1 == 0 || self.rflags & !(flags::ALL | flags::FIXED_1) != 0 {
            return refuse(REGISTERS, "RFLAGS has reserved bits");
        }
        let cr0 = |bit| self.cr0 & bit != 0;
        if self.cr0 & !CR0_ALL != 0 || cr0(CR0_PG) && !cr0(CR0_PE) || cr0(CR0_NW) && !cr0(CR0_CD) {
            return refuse(CONTROL, "CR0 is impossible");
        }
        if self.cr4 & !CR4_KNOWN != 0 {
            return refuse(CONTROL, "CR4 has unknown bits");
        }
        if self.cr3 >> paging::PHYSICAL_ADDRESS_BITS != 0 {
            return refuse(CONTROL, "CR3 is beyond the physical address space");
        }
        let long = self.efer & EFER_LMA != 0;
        let long_wanted = self.efer & EFER_LME != 0 && cr0(CR0_PG);
        if self.efer & !(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE) != 0 || long != long_wanted {
            return refuse(CONTROL, "EFER is impossible");
        }
        if long && (self.cr4 & CR4_PAE == 0 || self.rflags & flags::VM != 0)
            || !long && self.cr4 & CR4_PCIDE != 0
        {
            return refuse(CONTROL, "CR4 does not fit the mode");
        }
        let components = XCR0_X87 | XCR0_SSE | XCR0_AVX;
        let avx_alone = self.xcr0 & (XCR0_SSE | XCR0_AVX) == XCR0_AVX;
        if self.xcr0 & XCR0_X87 == 0 || self.xcr0 & !components != 0 || avx_alone {
            return refuse(CONTROL, "XCR0 is impossible");
        }
        if self.dr[4] >> 32 != 0 || self.dr[5] >> 32 != 0 {
            return refuse(DEBUG, "DR6 or DR7 has reserved bits");
        }
        let mut segments = self.segments.iter().chain([&self.ldtr, &self.tr]);
        if segments.any(|s| !fits(s.base)) {
            return refuse(SEGMENTS, "a segment's base is impossible");
        }
        if !fits(self.gdtr.base) || !fits(self.idtr.base) {
            return refuse(TABLES, "a descriptor table's base is impossible");
        }
        if !(long && self.segments[1].attributes.long()) && self.rip >> 32 != 0 {
            return refuse(REGISTERS, "RIP is too wide for the mode");
        }
        if self.sse.mxcsr & !flags::MXCSR_MASK != 0 {
            return refuse(SSE, "MXCSR has reserved bits");
        }
        if self.x87.opcode > 0x7FF {
            return refuse(X87, "the x87 opcode has more than 11 bits");
        }
        if self.msrs.iter().any(|(number, value)| !can_hold(*number, *value)) {
            return refuse(MSRS, "an MSR's value is impossible");
        }
        Ok(())
    }
}

/// Whether a base is canonical. Outside IA-32e mode, too: what 64-bit code left there stays.
fn fits(base: u64) -> bool {
    ((base << 16) as i64 >> 16) as u64 == base
}

/// Whether an MSR that engines load into the processor takes the value (SDM vol. 4, table 2-2): WRMSR would be #GP in the
/// host, or the guest's entry be refused.
fn can_hold(number: u32, value: u64) -> bool {
    match number {
        msr::LSTAR | msr::CSTAR | msr::KERNEL_GS_BASE | msr::SYSENTER_ESP | msr::SYSENTER_EIP => fits(value),
        msr::SYSENTER_CS | msr::SFMASK | msr::TSC_AUX => value >> 32 == 0,
        msr::PAT => value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)),
        _ => true,
    }
}

fn required<const N: usize>(
    r: &mut Fields<'_>,
    tag: u16,
    what: &'static str,
) -> Result<[u8; N], RestoreError> {
    let bytes = r.optional_bytes(tag, N)?.ok_or(RestoreError::Missing(what))?;
    bytes.try_into().map_err(|_| RestoreError::Length { tag, got: bytes.len(), expected: N })
}

fn optional_numbers<const N: usize>(r: &mut Fields<'_>, tag: u16) -> Result<Option<[u64; N]>, RestoreError> {
    let values = r.uints(tag, N)?;
    if values.is_empty() {
        return Ok(None);
    }
    let got = values.len() * 8;
    values.try_into().map(Some).map_err(|_| RestoreError::Length { tag, got, expected: N * 8 })
}

fn numbers<const N: usize>(
    r: &mut Fields<'_>,
    tag: u16,
    what: &'static str,
) -> Result<[u64; N], RestoreError> {
    optional_numbers(r, tag)?.ok_or(RestoreError::Missing(what))
}

/// Reads little-endian values off a fixed array; lengths were checked.
struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((head, rest)) = self.0.split_first_chunk::<N>() else { return [0; N] };
        self.0 = rest;
        *head
    }
    fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

fn put_segment(to: &mut Vec<u8>, segment: &Segment) {
    let Segment { selector, attributes, limit, base, unusable } = segment;
    to.extend_from_slice(&selector.to_le_bytes());
    to.extend_from_slice(&attributes.0.to_le_bytes());
    to.extend_from_slice(&limit.to_le_bytes());
    to.extend_from_slice(&base.to_le_bytes());
    to.push(u8::from(*unusable));
}

fn get_segments(r: &mut Fields<'_>) -> Result<([Segment; 6], Segment, Segment), RestoreError> {
    let raw = required::<{ 8 * SEGMENT_BYTES }>(r, SEGMENTS, "segment registers")?;
    let mut from = Cursor(&raw);
    let mut all = [Segment::default(); 8];
    for s in &mut all {
        s.selector = from.u16();
        s.attributes = SegmentAttributes(from.u16());
        s.limit = from.u32();
        s.base = from.u64();
        s.unusable = match from.u8() {
            0 => false,
            1 => true,
            _ => return Err(RestoreError::Value { tag: SEGMENTS, reason: "neither true nor false" }),
        };
        if s.attributes.0 > 0xFFF {
            return Err(RestoreError::Value { tag: SEGMENTS, reason: "segment attributes have 12 bits" });
        }
    }
    let [es, cs, ss, ds, fs, gs, ldtr, tr] = all;
    Ok(([es, cs, ss, ds, fs, gs], ldtr, tr))
}

fn get_tables(r: &mut Fields<'_>) -> Result<[DescriptorTable; 2], RestoreError> {
    let raw = required::<20>(r, TABLES, "descriptor tables")?;
    let mut from = Cursor(&raw);
    Ok(core::array::from_fn(|_| DescriptorTable { base: from.u64(), limit: from.u16() }))
}

fn get_msrs(r: &mut Fields<'_>) -> Result<Vec<(u32, u64)>, RestoreError> {
    let refuse = |reason| Err(RestoreError::Value { tag: MSRS, reason });
    let raw = r.uints(MSRS, MAX_MSRS * 2)?;
    if raw.len() % 2 != 0 {
        return refuse("an MSR without its value");
    }
    let mut msrs: Vec<(u32, u64)> = Vec::new();
    for pair in raw.chunks_exact(2) {
        let Ok(number) = u32::try_from(pair[0]) else { return refuse("MSR numbers have 32 bits") };
        if msrs.last().is_some_and(|(last, _)| *last >= number) {
            return refuse("MSRs do not ascend");
        }
        msrs.push((number, pair[1]));
    }
    Ok(msrs)
}

fn put_event(event: &PendingEvent) -> [u8; 15] {
    let PendingEvent { exception, error_code, address, is_trap } = event;
    let mut raw = [0; 15];
    raw[0] = exception.vector();
    raw[1] = u8::from(error_code.is_some());
    raw[2] = u8::from(*is_trap);
    raw[3..7].copy_from_slice(&error_code.unwrap_or_default().to_le_bytes());
    raw[7..].copy_from_slice(&address.to_le_bytes());
    raw
}

fn get_event(r: &mut Fields<'_>) -> Result<Option<PendingEvent>, RestoreError> {
    let Some(raw) = r.optional_bytes(EXCEPTION, 15)? else { return Ok(None) };
    if raw.len() != 15 {
        return Err(RestoreError::Length { tag: EXCEPTION, got: raw.len(), expected: 15 });
    }
    let mut from = Cursor(raw);
    let (vector, has_code, is_trap) = (from.u8(), from.u8(), from.u8());
    let (code, address) = (from.u32(), from.u64());
    let Some(exception) = Exception::from_vector(vector) else {
        return Err(RestoreError::Value { tag: EXCEPTION, reason: "no such exception" });
    };
    if has_code > 1 || is_trap > 1 || (has_code == 1) != exception.has_error_code() {
        return Err(RestoreError::Value { tag: EXCEPTION, reason: "the exception's details are impossible" });
    }
    let error_code = (has_code == 1).then_some(code);
    Ok(Some(PendingEvent { exception, error_code, address, is_trap: is_trap == 1 }))
}

fn put_x87(x87: &X87State) -> Vec<u8> {
    let X87State { registers, control, status, in_use, opcode, .. } = x87;
    let X87State { instruction_pointer, instruction_selector, data_pointer, data_selector, .. } = x87;
    let mut raw = Vec::with_capacity(X87_BYTES);
    for Float80 { mantissa, sign_exponent } in registers {
        raw.extend_from_slice(&mantissa.to_le_bytes());
        raw.extend_from_slice(&sign_exponent.to_le_bytes());
    }
    raw.extend_from_slice(&control.to_le_bytes());
    raw.extend_from_slice(&status.to_le_bytes());
    raw.push(*in_use);
    raw.extend_from_slice(&opcode.to_le_bytes());
    raw.extend_from_slice(&instruction_pointer.to_le_bytes());
    raw.extend_from_slice(&instruction_selector.to_le_bytes());
    raw.extend_from_slice(&data_pointer.to_le_bytes());
    raw.extend_from_slice(&data_selector.to_le_bytes());
    raw
}

fn get_x87(raw: &[u8; X87_BYTES]) -> X87State {
    let mut from = Cursor(raw);
    X87State {
        registers: core::array::from_fn(|_| Float80 { mantissa: from.u64(), sign_exponent: from.u16() }),
        control: from.u16(),
        status: from.u16(),
        in_use: from.u8(),
        opcode: from.u16(),
        instruction_pointer: from.u64(),
        instruction_selector: from.u16(),
        data_pointer: from.u64(),
        data_selector: from.u16(),
    }
}

fn put_sse(sse: &SseState) -> Vec<u8> {
    let SseState { xmm, mxcsr } = sse;
    let mut raw = put_halves(xmm);
    raw.extend_from_slice(&mxcsr.to_le_bytes());
    raw
}

fn get_sse(raw: &[u8; SSE_BYTES]) -> SseState {
    let mut from = Cursor(raw);
    SseState { xmm: core::array::from_fn(|_| [from.u64(), from.u64()]), mxcsr: from.u32() }
}

fn put_halves(registers: &[[u64; 2]; 16]) -> Vec<u8> {
    registers.iter().flatten().flat_map(|v| v.to_le_bytes()).collect()
}

fn get_halves(raw: &[u8; 256]) -> [[u64; 2]; 16] {
    let mut from = Cursor(raw);
    core::array::from_fn(|_| [from.u64(), from.u64()])
}

/// A blob of another crate's kind inside this state.
struct NestedBlob(StateBlob);

impl SavedState for NestedBlob {
    const KIND: &'static str = "blob";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let StateBlob { kind, version, data } = &self.0;
        w.text(CRITICAL | 1, kind).uint(CRITICAL | 2, *version).bytes(CRITICAL | 3, data);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self(StateBlob {
            kind: r.text(CRITICAL | 1, 64)?,
            version: r.uint(CRITICAL | 2)?,
            data: r.bytes(CRITICAL | 3, MAX_APIC_BYTES)?.to_vec(),
        }))
    }
}
