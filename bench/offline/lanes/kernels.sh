# The codec's kernels against plain torch: agreement, rates (10 s).
lim scale 40 python3 klt_scale.py --hidden 576 --keep 4 --tokens 138240 --stages range,code --out "$R"
