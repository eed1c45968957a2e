# Entry by PVH (Xen's x86/HVM direct boot ABI): 32-bit protected mode, paging off, EBX = address of hvm_start_info; or by
# our UEFI loader at the ELF entry: 64-bit mode, memory mapped one to one, interrupts off, RDI = that address.
# It maps the first 4 GiB one to one with pages of 2 MiB, enters long mode and calls `metal_start`. The tables here are
# replaced by arch/paging.rs as soon as there is a heap.
.section .note.pvh, "a", @note
.align 4
.long 4, 4, 18                  # name and descriptor sizes, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.long pvh_start

.section .text.boot, "ax"
.code32
.global pvh_start
pvh_start:
    cli
    cld
    mov esp, offset boot_stack_top
    mov edi, ebx
    mov eax, offset boot_pdpt
    or eax, 3
    mov [boot_pml4], eax
    xor ecx, ecx
    mov eax, offset boot_pds
    or eax, 3
2:  mov [boot_pdpt + ecx*8], eax
    add eax, 4096
    inc ecx
    cmp ecx, 4
    jne 2b
    xor ecx, ecx
    mov eax, 0x83               # present, writable, large
3:  mov [boot_pds + ecx*8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 3b
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
    lgdt [boot_gdtr]
    push 8
    mov eax, offset long_start
    push eax
    retf
.code64
.global loader_start
loader_start:
    cli
    cld
    lea rsp, [rip + boot_stack_top]
    lea rax, [rip + boot_pdpt + 3]
    mov [rip + boot_pml4], rax
    lea rax, [rip + boot_pds + 3]
    lea rdx, [rip + boot_pdpt]
    xor ecx, ecx
4:  mov [rdx + rcx*8], rax
    add rax, 4096
    inc ecx
    cmp ecx, 4
    jne 4b
    lea rdx, [rip + boot_pds]
    xor ecx, ecx
    mov eax, 0x83
5:  mov [rdx + rcx*8], rax
    add rax, 0x200000
    inc ecx
    cmp ecx, 2048
    jne 5b
    lea rax, [rip + boot_pml4]
    mov cr3, rax
    lgdt [rip + boot_gdtr]
    push 8
    lea rax, [rip + long_start]
    push rax
    retfq
long_start:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov edi, edi
    lea rsp, [rip + boot_stack_top]
    xor ebp, ebp                # the end of every backtrace
    call metal_start
1:  cli
    hlt
    jmp 1b

.section .data
.align 16
boot_gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
boot_gdtr: .short 23
.quad boot_gdt

.section .bss.guarded, "aw", @nobits
.align 4096
.global boot_stack_guard
boot_stack_guard: .skip 4096    # unmapped by arch/paging.rs
# As large as that of a thread elsewhere: a vCPU is built on it before it moves to the heap.
boot_stack: .skip 2 << 20
.global boot_stack_top
boot_stack_top:
# The other processors start with them, too (processors.s).
.global boot_pml4
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pds: .skip 16384
