#!/usr/bin/env bash
# LLaVA-1.5-7B, https://arxiv.org/abs/2310.03744, from the download to the evaluation: the whole story as one script.
#
#     configs/llava-1.5-7b/run.sh             # on 8 GPUs of 80 GB, after `make setup`
#     NUM_GPUS=4 configs/llava-1.5-7b/run.sh  # the same global batches on 4
#
# A step that is done is not done again: kill it and start it again at any time. It was not run here, where there are
# neither these data nor GPUs; a test holds that its commands and settings are taken.
# You need about 100 GB for data and pictures, and 250 GB for checkpoints and saved states.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"

NUM_GPUS=${NUM_GPUS:-8}
case $NUM_GPUS in
    1 | 2 | 4 | 8) ;;
    *) echo "NUM_GPUS must be 1, 2, 4 or 8, so that the global batches stay those of the paper; got $NUM_GPUS" >&2 && exit 2 ;;
esac
CONFIGS=configs/llava-1.5-7b
RUNS=runs/llava-1.5-7b

# 1. Data of stage 1: 558,000 captions of LAION, CC and SBU, and their pictures (27 GB).
if [ ! -d data/LLaVA-Pretrain/00000 ]; then
    hf download liuhaotian/LLaVA-Pretrain --repo-type dataset --local-dir data/LLaVA-Pretrain
    unzip -q -o data/LLaVA-Pretrain/images.zip -d data/LLaVA-Pretrain
fi

# 2. Data of stage 2: 665,000 conversations. Their pictures come from five places; LLaVA's authors list them at
#    https://github.com/haotian-liu/LLaVA#visual-instruction-tuning . Put each under data/, as the rows name them:
#    data/coco/train2017, data/gqa/images, data/ocr_vqa/images, data/textvqa/train_images, data/vg/VG_100K and VG_100K_2
hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json --repo-type dataset --local-dir data
for folder in coco/train2017 gqa/images ocr_vqa/images textvqa/train_images vg/VG_100K vg/VG_100K_2; do
    if [ ! -d "data/$folder" ]; then
        echo "data/$folder is missing: bring the pictures of stage 2, see the comment in $0" >&2
        exit 1
    fi
done

# 3. The parts: CLIP ViT-L/14-336 comes through open_clip, Vicuna 7B from the hub. What is missing is said here.
mmllm doctor

# 4. Look at every row and picture before a GPU is used. Rows that cannot be used are listed, and left out by the run.
mmllm check "$CONFIGS/stage1.yaml"

# 5. Stage 1: the projector alone, one epoch, global batch 256. LLaVA's authors say 3.5 hours on 8 A100.
#    Each GPU holds the whole frozen LLM, so plain DDP does.
if [ ! -f "$RUNS/stage1/manifest.json" ]; then
    mmllm plan "$CONFIGS/stage1.yaml" compute.batch_size=32 --gpus "$NUM_GPUS"
    accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes "$NUM_GPUS" \
        train/stage1.py "$CONFIGS/stage1.yaml" compute.batch_size=32 compute.accumulate_steps=$((8 / NUM_GPUS))
fi

# 6. Does it see? Describe a picture of the training data.
mmllm chat "$RUNS/stage1" --image data/coco/train2017/000000000009.jpg --prompt "Describe the picture."

# 7. Stage 2: projector and LLM, one epoch, global batch 128. LLaVA's authors say 10 hours on 8 A100.
#    Weights, gradients and optimizer of 7B do not fit on one GPU beside each other, so FSDP2 divides them.
mmllm check "$CONFIGS/stage2.yaml"
if [ ! -f "$RUNS/stage2/manifest.json" ]; then
    accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes "$NUM_GPUS" \
        train/stage2.py "$CONFIGS/stage2.yaml" compute.batch_size=16 compute.accumulate_steps=$((8 / NUM_GPUS))
fi

# 8. What came of it. `report.html` in the run's folder has the curves.
mmllm doctor "$RUNS/stage2"
mmllm chat "$RUNS/stage2" --image data/coco/train2017/000000000009.jpg --prompt "What is on the plate?"

# 9. Evaluation. The drawn scenes were never trained on: they show whether it looks, and at what it fails.
if [ ! -d data/scenes/val ]; then
    mmllm scenes data/scenes --train 0 --val 500
fi
mmllm eval "$RUNS/stage2" scenes-val --out "$RUNS/scenes-val.json"

# 10. For the benchmarks of the paper (VQAv2, GQA, MMBench ...), and for a server: transformers' own class.
if [ ! -d models/llava-1.5-7b-hf ]; then
    mmllm export hf "$RUNS/stage2" models/llava-1.5-7b-hf
fi
