"Everything a notebook user needs: `from fmce_fastai.all import *`."
from fmce_fastai.convergence.online import OnlineCQI
from fmce_fastai.convergence.run import Convergence, ConvergenceError, ConvergenceWarning, convergence
from fmce_fastai.data.arrays import array_dls
from fmce_fastai.data.digits import digits_dls
from fmce_fastai.data.folder import folder_dls
from fmce_fastai.data.glyphs import glyphs_dls
from fmce_fastai.data.images import DataError
from fmce_fastai.data.names import data_sets, get_dls
from fmce_fastai.data.openclipart import openclipart_dls
from fmce_fastai.data.torchvision import cifar10_dls, cifar100_dls, fashion_mnist_dls, mnist_dls
from fmce_fastai.hub.transfer import HubError
from fmce_fastai.maps.check import check_taps
from fmce_fastai.maps.find import tap_plan
from fmce_fastai.maps.head import image_size_kwargs, timm_head
from fmce_fastai.maps.plan import Tap, TapError, TapPlan
from fmce_fastai.maps.tap import FeatureTap
from fmce_fastai.oracle.alignment import AlignmentFMCENet
from fmce_fastai.oracle.base import as_oracle, FMCENet, OracleError, Scores
from fmce_fastai.oracle.dataset import DatasetError, FMCSDataset
from fmce_fastai.oracle.files import OracleFileError
from fmce_fastai.oracle.fit import fit_oracle
from fmce_fastai.oracle.fitted import FittedFMCENet
from fmce_fastai.oracle.judge import judge_oracle, score_dataset
from fmce_fastai.oracle.quality import QualityFMCENet
from fmce_fastai.oracle.ridge import RidgeFMCENet
from fmce_fastai.oracle.universal import UniversalFMCENet
from fmce_fastai.report.cam import CamError, cam_plan, grad_cam
from fmce_fastai.report.check import CheckWeights
from fmce_fastai.report.checkpoint import CheckpointError, compare_keys, matching_state
from fmce_fastai.report.plots import fmcs_over_training, plot_calibration, plot_fmcs
from fmce_fastai.report.report import fmce_report
from fmce_fastai.report.weights import weight_report
from fmce_fastai.study.alphas import fine_tune_alphas
from fmce_fastai.study.cam_statistics import cam_statistics
from fmce_fastai.study.cams import CamComparison, compare_cams
from fmce_fastai.study.run import run_study
from fmce_fastai.study.arms import StudyError
from fmce_fastai.study.settings import Study
from fmce_fastai.train.callback import FMCECallback
from fmce_fastai.train.freeze import FMCSFreeze
from fmce_fastai.train.losses import fmcs_loss, representation_auxiliary_loss
from fmce_fastai.train.recorder import FMCSRecorder, snapshot_steps
from fmce_fastai.util.state import hook_count

__all__ = [name for name in dir() if not name.startswith("_")]
