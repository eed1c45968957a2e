#!/bin/sh
# Makes the ext4 partition of the Debian disk out of the system's archive.
# Runs as root, or as root of a user namespace: debian_disk.sh ARCHIVE FOLDER DISK START_BYTES BLOCKS
set -eu
archive=$1 folder=$2 disk=$3 start=$4 blocks=$5
rm -rf "$folder"
mkdir -p "$folder/system"
tar -C "$folder/system" --xattrs --xattrs-include='*' --numeric-owner -xpf "$archive"
cp "$folder/system/boot/"vmlinuz-* "$folder/vmlinuz"
cp "$folder/system/boot/"initrd.img-* "$folder/initrd.img"
chmod 0644 "$folder/vmlinuz" "$folder/initrd.img"
mke2fs -q -F -t ext4 -b 4096 -L bedplate-root \
    -U bed91a7e-0000-4000-8000-000000000012 \
    -E "offset=$start,root_owner=0:0,hash_seed=bed91a7e-0000-4000-8000-00000000000c,lazy_itable_init=1" \
    -d "$folder/system" "$disk" "$blocks"
rm -rf "$folder/system"
