# Where the other processors start: a page below 1 MiB gets a copy of what lies between `ap_page` and `ap_page_end`, and
# the processor comes there in real mode (SDM vol. 3, 9.4.4). It enters long mode with boot.s's tables, which map the
# first 4 GiB one to one, takes the stack that stands in `ap_stack`, and calls `arch::processors::started`. One at a time.
.section .rodata
.balign 16
.code16
.global ap_page
ap_page:
    cli
    cld
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0F, 0x01, 0x16    # LGDT with a 32-bit base
    .short ap_gdtr - ap_page
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xEA            # a far jump to a 32-bit offset
    .long ap_protected
    .short 8
.balign 4
ap_gdtr:
    .short 31
    .long ap_gdt
.global ap_page_end
ap_page_end:
.balign 8
ap_gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff

.section .text
.code32
ap_protected:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, [ap_stack]
    mov eax, offset boot_pml4
    mov cr3, eax
    mov eax, cr4
    or eax, 0x20                # PAE
    mov cr4, eax
    mov ecx, 0xc0000080         # EFER.LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0x9fffffff         # caches on
    or eax, 0x80000001
    mov cr0, eax
    push 24
    mov eax, offset ap_long
    push eax
    retf
.code64
ap_long:
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov rsp, [rip + ap_stack]
    xor ebp, ebp                # the end of every backtrace
    call {started}
1:  cli
    hlt
    jmp 1b

.section .data
.balign 8
.global ap_stack
ap_stack: .quad 0

# What comes next in the same unit finds things as it expects them.
.section .text
.code64
